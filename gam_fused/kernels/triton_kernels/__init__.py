"""Multi-tensor kernels in Triton: one program for each chunk of each tensor, whatever the number of tensors.

Every kernel begins with the same four arguments, which :mod:`gam_fused.kernels.pointer_tables` makes:

* ``pointers``: int64, ``[rows + 1, tensors]``: the addresses of each list's tensors, then whether all addresses of a
  tensor are multiples of 16 bytes;
* ``plan``: int64: the number of elements of each tensor, then for each chunk its tensor, then for each chunk its number
  within the tensor;
* ``tensors`` and ``chunks``, their numbers.

A whole chunk of aligned tensors is read and written without a mask, in 16 bytes a thread; any other one with a mask,
and under no promise of alignment. Scalars come as bits, see :func:`~gam_fused.kernels.triton_rules.number`; norms and
guards are read from the device. Neither values nor alignments of either make Triton compile a kernel again.

mypy cannot read Triton's language: these modules are checked by the tests alone.
"""

# mypy: ignore-errors

from gam_fused.kernels.triton_kernels.adamw import adamw_kernel, count_steps_kernel
from gam_fused.kernels.triton_kernels.combine import combine_kernel, restore_kernel
from gam_fused.kernels.triton_kernels.decompose import decompose_kernel, finish_projection_kernel, sum_mixed_kernel
from gam_fused.kernels.triton_kernels.norms import finish_norms_kernel, sum_chunks_kernel
from gam_fused.kernels.triton_kernels.perturb import perturb_kernel
from gam_fused.kernels.triton_kernels.sgd import sgd_kernel
from gam_fused.kernels.triton_kernels.shift import shift_kernel

__all__ = [
    "adamw_kernel",
    "combine_kernel",
    "count_steps_kernel",
    "decompose_kernel",
    "finish_norms_kernel",
    "finish_projection_kernel",
    "perturb_kernel",
    "restore_kernel",
    "sgd_kernel",
    "shift_kernel",
    "sum_chunks_kernel",
    "sum_mixed_kernel",
]
