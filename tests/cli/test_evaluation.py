"""Evaluation: right numbers, and no trace left behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from gam_fused import reference
from gam_fused.cli.data import Split
from gam_fused.cli.evaluation import first_order_flatness, loss_and_accuracy
from gam_fused.cli.models import MODELS, ImageShape


def _split(size: int, dtype: torch.dtype = torch.float32) -> Split:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    return Split(images, torch.randint(0, 10, (size,), generator=generator))


def _model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    model = MODELS[name](ImageShape(1, 8, 10)).to(dtype)
    for _ in range(3):  # running statistics other than the initial ones
        model(torch.randn(16, 1, 8, 8, dtype=dtype))
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_flatness_is_rho_times_the_gradient_norm_at_the_reference_adversarial_point(name: str, rho: float) -> None:
    model, split = _model(name, torch.float64), _split(6, torch.float64)
    names = [name for name, _ in model.named_parameters()]

    def loss(params: list[Tensor]) -> Tensor:
        return cross_entropy(
            functional_call(model, dict(zip(names, params, strict=True)), (split.images,)), split.labels
        )

    measured = first_order_flatness(model, split, rho)
    model.eval()
    terms = reference.gam_terms(loss, list(model.parameters()), rho=rho, alpha=0.0, xi=0.0)
    assert measured == pytest.approx(rho * reference.global_norm(terms.g_adv).item(), rel=1e-9)


def test_flatness_of_a_quadratic_in_closed_form() -> None:
    """Two classes, one weight w and images ±x: L = log(1 + exp(−2wx)), all derivatives known by hand."""

    class Logit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([self.w * images, -self.w * images], dim=1)

    x, w, rho = 1.7, 0.3, 0.25
    split = Split(torch.tensor([x, -x], dtype=torch.float64), torch.tensor([0, 1]))

    def slope(at: float) -> float:
        return -2 * x / (1 + math.exp(2 * at * x))

    # |L'| falls with w, so the ascent of the gradient norm goes down, whatever its size: by exactly rho.
    assert first_order_flatness(Logit(), split, rho) == pytest.approx(rho * abs(slope(w - rho)), rel=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_changed(name: str) -> None:
    model, split = _model(name), _split(40)
    model.train()
    for param in model.parameters():
        param.grad = torch.full_like(param, 7.0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tensors = [id(param) for param in model.parameters()]
    state = torch.get_rng_state()
    loss_and_accuracy(model, split)
    first_order_flatness(model, split)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [id(param) for param in model.parameters()] == tensors
    assert all(bool((param.grad == 7).all()) for param in model.parameters() if param.grad is not None)
    assert all(param.requires_grad and param.grad is not None for param in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_loss_and_accuracy_are_those_of_the_whole_split_at_once() -> None:
    """2,500 images go through in unequal portions; the mean must weigh images, not portions."""
    model, split = _model("resnet"), _split(2_500)
    loss, accuracy = loss_and_accuracy(model, split)
    model.eval()
    logits = model(split.images)
    assert loss == pytest.approx(cross_entropy(logits, split.labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == split.labels).sum().item() / 2_500
