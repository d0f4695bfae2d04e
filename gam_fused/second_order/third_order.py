"""Derivatives beyond the second, which no layer of this package has a formula for: by autograd over PyTorch's own.

A gradient penalty inside a loss whose Hessian-vector product is taken needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def differentiable_double_backward(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    grad_output: Tensor,
    double_grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """What a double backward returns, with a graph through which it can be differentiated again, as often as one likes.

    Args:
        function: PyTorch's own operator, from ``inputs`` to one output.
        inputs: where it is differentiated.
        grad_output: the gradient of the output that the first backward was given.
        double_grads: for each input, the gradient of the gradient that the first backward returned for it.

    Returns:
        The gradients of ``grad_output`` and of each input; ``None`` where there is none.
    """
    # Views, so that differentiating by them stops here, and differentiating what comes of it does not.
    at = [tensor.view_as(tensor) for tensor in inputs]
    along = grad_output.view_as(grad_output)
    by = [i for i, tensor in enumerate(at) if tensor.requires_grad]
    with torch._C.DisableTorchFunction():  # the function itself, whatever mode is on
        grads = torch.autograd.grad(
            function(*at), [at[i] for i in by], along, create_graph=True, allow_unused=True, materialize_grads=True
        )
        given = [(grad, given) for grad, i in zip(grads, by, strict=True) if (given := double_grads[i]) is not None]
        given = [(grad, double_grad) for grad, double_grad in given if grad.requires_grad]
        results: list[Tensor | None] = [None] * (1 + len(at))
        if not given:
            return results
        places = [i for i, tensor in enumerate([along, *at]) if tensor.requires_grad]
        found = torch.autograd.grad(
            [grad for grad, _ in given],
            [[along, *at][i] for i in places],
            [double_grad for _, double_grad in given],
            create_graph=True,
            allow_unused=True,
        )
    for place, result in zip(places, found, strict=True):
        results[place] = result
    return results
