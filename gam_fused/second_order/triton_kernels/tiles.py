"""How programs read and write tiles of tensors."""
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gam_fused.kernels.triton_rules import narrow, widen

# Triton would compile a kernel anew for a number of 1 or one that 16 divides, and for parameters at another alignment.
# That of the tensors shaped like the input it has to know.
_NUMBERS = [
    *("samples", "channels", "positions", "of_group", "slices", "portions", "steps", "rows", "size", "programs"),
]
_PARAMETERS = ["weight", "mean", "invstd", "gg_weight", "gg_bias", "grad_weight"]
kernel = triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_PARAMETERS)


@triton.jit
def wide(size, VEC: tl.constexpr, PACKED: tl.constexpr):
    """``size`` as int64, since products of sizes need it. If ``PACKED``, Triton gets to know that VEC divides it."""
    if PACKED:
        return size.to(tl.int64) // VEC * VEC
    else:
        return size.to(tl.int64)


@triton.jit
def load(tensor, places, inside, A: tl.constexpr, ABSENT: tl.constexpr = 0.0):
    """Elements in the accumulation dtype, 0 outside; ``ABSENT`` everywhere if there is no tensor."""
    if tensor is None:
        return tl.full(places.shape, ABSENT, A)
    else:
        return widen(tl.load(tensor + places, mask=inside, other=0.0), A)


@triton.jit
def store(tensor, places, inside, value):
    """In the tensor's dtype, if there is a tensor."""
    if tensor is not None:
        tl.store(tensor + places, narrow(value, tensor.dtype.element_ty), mask=inside)
