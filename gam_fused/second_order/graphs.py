"""When the backward of a layer records a function of its own, for a second derivative."""

from __future__ import annotations

import torch
from torch import Tensor

_is_batched = torch._C._functorch.is_batchedtensor
_is_batched_by_autograd = torch._C._functorch.is_legacy_batchedtensor


def makes_graph(grad_output: Tensor) -> bool:
    """Whether it does: a graph is asked for, of one backward pass at a time.

    Under ``torch.autograd.grad(..., is_grads_batched=True)``, functions written in Python record nothing: PyTorch's own
    operators have to.
    """
    return torch.is_grad_enabled() and not is_batched(grad_output)


def is_batched(tensor: Tensor) -> bool:
    """Whether several backward passes are made at once."""
    return bool(_is_batched(tensor) or _is_batched_by_autograd(tensor))


def refuse_batch(tensor: Tensor, layer: str) -> None:
    """Raise where several passes are made at once with a graph, and PyTorch has no operator that would record it."""
    if torch.is_grad_enabled() and is_batched(tensor):
        raise RuntimeError(
            f"is_grads_batched=True with create_graph=True through {layer}: its backward on the layers of "
            "gam_fused.second_order cannot be batched and differentiated again. Take the gradients one at a time, or "
            "use second_order='off'."
        )
