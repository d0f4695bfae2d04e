"""Architectures of other packages, with random weights, are stepped exactly."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import step_models
from benchmarks.packages import imported
from benchmarks.step_models import MODELS
from gam_fused import GAM
from gam_fused.closures import evaluate
from gam_fused.replay import Replay
from tests import literal
from tests.literal import assert_equal_to_rounding
from tests.second_order.layers_common import every_size_worthwhile

CLASSES, VOCABULARY = 5, 11
RHO, ALPHA, LR = 0.1, 0.4, 0.3


@dataclass
class Problem:
    """A model and the batch that it is trained on, in float64."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def loss(self, net: Callable[..., Any]) -> Tensor:
        """With the same dropout masks each time: the formulas do not replay them."""
        torch.manual_seed(3)
        return F.cross_entropy(net(self.inputs.to(next(self.model.parameters()).dtype)), self.labels)


class Tokens(Problem):
    def loss(self, net: Callable[..., Any]) -> Tensor:
        torch.manual_seed(3)
        return F.cross_entropy(net(self.inputs).logits.flatten(0, 1), self.labels.flatten())


class Measured(Problem):
    """What the step benchmark trains."""

    def __init__(self, measured: step_models.Problem) -> None:
        super().__init__(measured.model, measured.inputs, measured.targets)
        self._measured = measured

    def loss(self, net: Callable[..., Any]) -> Tensor:
        return self._measured.loss_of(net(self.inputs), self.labels)


def convnext() -> Problem:
    """Four stages of depthwise convolutions, layer norms and GELU, with stochastic depth."""
    model = imported("timm.models.convnext", "timm").ConvNeXt(
        num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(6, 8, 8, 10), ls_init_value=0.5, drop_path_rate=0.2
    )
    return Problem(model, torch.randn(3, 3, 32, 32), torch.randint(CLASSES, (3,)))


def vit() -> Problem:
    """Patches of 4 × 4, two blocks of attention and GELU, with dropout in every place that has one."""
    model = imported("timm.models.vision_transformer", "timm").VisionTransformer(
        img_size=16, patch_size=4, num_classes=CLASSES, embed_dim=8, depth=2, num_heads=2,
        drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.2,
    )  # fmt: skip
    return Problem(model, torch.randn(3, 3, 16, 16), torch.randint(CLASSES, (3,)))


def gpt2() -> Problem:
    """Two blocks of causal attention and GELU by tanh, written out, with dropout; embedding and read-out are tied."""
    transformers = imported("transformers", "transformers")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=7, n_embd=8, n_layer=2, n_head=2, use_cache=False, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    tokens = torch.randint(VOCABULARY, (3, 8))
    return Tokens(transformers.GPT2LMHeadModel(config), tokens[:, :-1], tokens[:, 1:])


ARCHITECTURES: dict[str, Callable[[], Problem]] = {"convnext": convnext, "vit": vit, "gpt2": gpt2}
over_precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"]
)
over_architectures = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(autouse=True, scope="module")
def _no_network() -> Iterator[None]:
    def connect(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a connection to {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        yield


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


def problem(name: str, dtype: torch.dtype = torch.float64) -> Problem:
    torch.manual_seed(5)
    made = ARCHITECTURES[name]()
    with torch.no_grad():
        for param in made.model.parameters():  # beyond what models start from, where much is close to linear
            param.add_(0.2 * torch.randn_like(param))
    made.model.to(dtype).train()
    return made


def product(given: Problem, second_order: str) -> tuple[Tensor, int]:
    """H g by ``second_order``, as one vector, and how many layers of ours the loss has gone through."""
    params, ours = list(given.model.parameters()), 0

    def closure() -> Tensor:
        nonlocal ours
        loss = given.loss(given.model)
        ours = layers_of_ours(loss)
        return loss

    with torch.no_grad():
        replay = Replay(given.model, params)
        gradients = evaluate(closure, params, replay, create_graph=True, second_order=second_order).gradients
        assert all(grad is not None for grad in gradients.total)
        return literal.flat(gradients.hvp(range(len(params)), gradients.total)), ours  # type: ignore[arg-type]


def layers_of_ours(loss: Tensor) -> int:
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    functions = [getattr(type(node), "_forward_cls", None) for node in seen]
    return sum(f is not None and f.__module__.startswith("gam_fused.second_order") for f in functions)


@over_architectures
@over_precisions
def test_products_on_our_layers_are_those_on_pytorchs(name: str, dtype: torch.dtype, tolerance: float) -> None:
    on_ours, ours = product(problem(name, dtype), "auto")
    on_theirs, none = product(problem(name, dtype), "off")
    assert (ours > 5, none) == (True, 0)
    assert on_theirs.norm() > 0
    assert (on_ours - on_theirs).norm() <= tolerance * on_theirs.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2"])  # which takes gigabytes
@over_precisions
def test_products_on_our_layers_are_those_on_pytorchs_in_what_the_benchmark_trains(
    name: str, dtype: torch.dtype, tolerance: float
) -> None:
    cpu = torch.device("cpu")
    on_ours, ours = product(Measured(step_models.problem(name, cpu).to(cpu, dtype)), "auto")
    on_theirs, none = product(Measured(step_models.problem(name, cpu).to(cpu, dtype)), "off")
    assert (ours > 0, none) == (True, 0)
    assert on_theirs.norm() > 0
    assert (on_ours - on_theirs).norm() <= tolerance * on_theirs.norm()


@over_architectures
@pytest.mark.parametrize("second_order", ["auto", "off"])
def test_a_step_is_the_literal_one(name: str, second_order: str) -> None:
    given = problem(name)
    params = list(given.model.parameters())
    function = literal.as_function(given.model, given.loss)
    with sdpa_kernel(SDPBackend.MATH):
        expected = literal.step(function, params, rho=RHO, alpha=ALPHA, lr=LR)
    optimizer = GAM(params, rho=RHO, alpha=ALPHA, lr=LR, model=given.model, second_order=second_order)
    optimizer.step(lambda: given.loss(given.model))
    assert int(optimizer.metrics["skipped_steps"]) == 0
    assert_equal_to_rounding(params, expected)
