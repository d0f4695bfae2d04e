"""What is measured at the end of an epoch. Nothing here changes the model, its buffers or any random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gam_fused.cli.data import Split

PROBE_RHO = 0.1
"""Radius for :func:`first_order_flatness`: one for all runs, whatever rho they train with, so that they compare."""

_TINY = 1e-12
_BATCH_SIZE = 1000


def loss_and_accuracy(model: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy (no label smoothing) and fraction of correct predictions, in evaluation mode."""
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    batches = zip(split.images.split(_BATCH_SIZE), split.labels.split(_BATCH_SIZE), strict=True)
    with _evaluation_mode(model), torch.no_grad():
        for images, labels in batches:
            logits = model(images)
            loss += cross_entropy(logits, labels, reduction="sum")
            correct += (logits.argmax(dim=1) == labels).sum()
    return loss.item() / len(split), correct.item() / len(split)


def first_order_flatness(model: nn.Module, split: Split, rho: float = PROBE_RHO) -> float:
    """First-order flatness R¹_ρ(θ) = ρ · max over the ball B(θ, ρ) of ‖∇L‖, for the mean loss L over ``split``.

    The maximum is approximated as in the paper, by one step of length ρ along the gradient f of the gradient norm::

        f = H(θ) ∇L(θ) / ‖∇L(θ)‖,     R¹_ρ(θ) ≈ ρ ‖∇L(θ + ρ f/‖f‖)‖

    with the exact Hessian H (double backward) and norms over all parameters. The model is in evaluation mode, so this
    is a property of the weights: no dropout, BatchNorm with its running statistics. The unit is that of the loss.

    The perturbed weights are handed to the model for the call (``functional_call``); the parameters are never written,
    so there is nothing to restore.
    """
    names = [name for name, param in model.named_parameters() if param.requires_grad]
    weights = [param.detach().requires_grad_() for param in model.parameters() if param.requires_grad]

    def gradient(at: list[Tensor], create_graph: bool) -> list[Tensor]:
        logits = functional_call(model, dict(zip(names, at, strict=True)), (split.images,))
        return list(torch.autograd.grad(cross_entropy(logits, split.labels), at, create_graph=create_graph))

    with _evaluation_mode(model), torch.enable_grad():
        gradients = gradient(weights, create_graph=True)
        # f up to its length, which the next line divides out.
        ascent = torch.autograd.grad(gradients, weights, grad_outputs=[g.detach() for g in gradients])
        scale = rho / (_norm(ascent) + _TINY)
        adversarial = [
            (weight + scale * direction).detach().requires_grad_()
            for weight, direction in zip(weights, ascent, strict=True)
        ]
        return rho * _norm(gradient(adversarial, create_graph=False)).item()


def _norm(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
