"""``layers()``: which calls are taken, which are left alone, and that nothing is left behind."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad, grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gam_fused.second_order import layers, rerouting
from tests.second_order.common import Operators
from tests.second_order.layers_common import TOLERANCE, draw, every_size_worthwhile, is_ours


@pytest.fixture(autouse=True, scope="module")
def _every_size() -> Iterator[None]:
    with every_size_worthwhile():
        yield


def conv(inputs: Tensor | None = None) -> Tensor:
    return F.conv2d(draw(2, 3, 5, 5) if inputs is None else inputs, draw(4, 3, 3, 3))


def attend(*shape: int) -> Tensor:
    return F.scaled_dot_product_attention(draw(*shape), draw(*shape), draw(*shape))


CALLS: dict[str, Callable[[], Tensor]] = {
    "F.conv1d": lambda: F.conv1d(draw(2, 3, 5), draw(4, 3, 3)),
    "F.conv2d": conv,
    "torch.conv2d": lambda: torch.conv2d(draw(2, 3, 5, 5), weight=draw(4, 3, 3, 3), padding="same"),
    "F.conv3d": lambda: F.conv3d(draw(2, 3, 3, 3, 3), draw(4, 3, 3, 3, 3)),
    "F.conv_transpose1d": lambda: F.conv_transpose1d(draw(2, 3, 5), draw(3, 4, 3)),
    "F.conv_transpose2d": lambda: F.conv_transpose2d(draw(2, 3, 5, 5), draw(3, 4, 3, 3)),
    "F.conv_transpose3d": lambda: F.conv_transpose3d(draw(2, 3, 3, 3, 3), draw(3, 4, 3, 3, 3)),
    "nn.Conv2d": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular").double()(draw(2, 3, 5, 5)),
    "nn.ConvTranspose2d": lambda: nn.ConvTranspose2d(3, 4, 3).double()(draw(2, 3, 5, 5)),
    "F.gelu": lambda: F.gelu(draw(3, 4)),
    "nn.GELU": lambda: nn.GELU("tanh")(draw(3, 4)),
    "F.silu": lambda: F.silu(draw(3, 4)),
    "nn.SiLU": lambda: nn.SiLU()(draw(3, 4)),
    "torch.softmax": lambda: torch.softmax(draw(3, 4), 1),
    "Tensor.softmax": lambda: draw(3, 4).softmax(dim=-1),
    "F.softmax": lambda: F.softmax(draw(3, 4), dim=-1),
    "nn.Softmax": lambda: nn.Softmax(1)(draw(3, 4)),
    "torch.log_softmax": lambda: torch.log_softmax(draw(3, 4), -1),
    "Tensor.log_softmax": lambda: draw(3, 4).log_softmax(1),
    "F.log_softmax": lambda: F.log_softmax(draw(3, 4), 1, dtype=torch.float64),
    "F.cross_entropy": lambda: F.cross_entropy(draw(3, 4), torch.tensor([0, 1, 2]), reduction="sum"),
    "nn.CrossEntropyLoss": lambda: nn.CrossEntropyLoss(reduction="none")(draw(3, 4), torch.tensor([0, 1, 2])),
    "F.scaled_dot_product_attention": lambda: attend(2, 2, 3, 4),
}
over_calls = pytest.mark.parametrize("name", CALLS)


@over_calls
def test_a_function_is_ours_inside_and_pytorchs_outside(name: str) -> None:
    results = []
    for context in (layers(), sdpa_kernel(SDPBackend.MATH)):
        torch.manual_seed(0)
        with context:
            results.append(CALLS[name]())
    ours, theirs = results
    assert is_ours(ours)
    assert not is_ours(theirs)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ what is left alone


class Subclass(Tensor):
    pass


class SilentSubclass(Tensor):
    """Whose functions are all that a mode is told of."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


LEFT_ALONE: dict[str, Callable[[], Any]] = {
    "no gradients wanted": lambda: F.conv2d(draw(2, 3, 5, 5).detach(), draw(4, 3, 3, 3).detach()),
    "no_grad": torch.no_grad()(conv),
    "complex": lambda: F.conv2d(draw(2, 3, 5, 5).to(torch.complex128), draw(4, 3, 3, 3).to(torch.complex128)),
    "subclass": lambda: conv(draw(2, 3, 5, 5).detach().as_subclass(Subclass)).as_subclass(Tensor),
    "silent subclass": lambda: conv(draw(2, 3, 5, 5).detach().as_subclass(SilentSubclass)).as_subclass(Tensor),
    "functorch": lambda: torch.vmap(F.conv2d, in_dims=(0, None))(draw(2, 1, 3, 5, 5), draw(4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_no_plain_differentiation_is_pytorchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expected = LEFT_ALONE[name]()
    torch.manual_seed(0)
    monkeypatch.setitem(rerouting._REPLACEMENTS, F.conv2d, NotImplemented)  # to call that fails
    with layers():
        result = LEFT_ALONE[name]()
    assert not is_ours(result)
    assert torch.equal(result, expected)


def test_tensors_without_data_are_left_alone() -> None:
    weight = torch.empty(4, 3, 3, 3, device="meta", requires_grad=True)
    with layers():
        output = F.conv2d(torch.empty(2, 3, 5, 5, device="meta"), weight)
    assert output.shape == (2, 4, 3, 3)
    assert not is_ours(output)


# The first use of forward mode in a process compiles its formulas.
compiles_formulas = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")


@compiles_formulas
def test_function_transforms_work_inside() -> None:
    weight, inputs = draw(4, 3, 3, 3).detach(), draw(2, 3, 5, 5).detach()
    loss = lambda w: F.gelu(F.conv2d(inputs, w)).square().sum()  # noqa: E731
    expected = torch.func.jvp(torch.func.grad(loss), (weight,), (weight,))[1]
    with layers():
        assert torch.equal(torch.func.jvp(torch.func.grad(loss), (weight,), (weight,))[1], expected)


@compiles_formulas
def test_forward_mode_differentiation_works_inside() -> None:
    inputs, weight = draw(2, 3, 5, 5), draw(4, 3, 3, 3)
    with layers(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(F.conv2d(forward_ad.make_dual(inputs, inputs), weight)).tangent
    torch.testing.assert_close(tangent, F.conv2d(inputs, weight))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_runs_inside_and_is_pytorchs(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU())
    inputs = torch.randn(2, 3, 5, 5)
    torch.compiler.reset()
    with layers():
        output = torch.compile(model, backend=backend, fullgraph=True)(inputs)
    torch.testing.assert_close(output, model(inputs))
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_can_be_traced_inside() -> None:
    model, inputs = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    with layers():
        traced = torch.jit.trace(model, inputs)
    assert torch.equal(traced(inputs), model(inputs))


# ------------------------------------------------------------------ other modes, other threads


class Recording(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_entered_inside_sees_the_call_and_ours_still_takes_it() -> None:
    with layers(), Recording() as mode:
        output = conv()
    assert F.conv2d in mode.seen
    assert is_ours(output)


def test_a_mode_around_is_handed_pytorchs_own_function() -> None:
    query = draw(1, 2, 3, 4)
    with Recording() as mode, layers():
        output = conv()
        F.scaled_dot_product_attention(query, query, query)
    assert F.conv2d in mode.seen
    assert F.scaled_dot_product_attention in mode.seen
    assert not is_ours(output)


def test_a_default_device_around_takes_nothing_away() -> None:
    with torch.device("cpu"), layers():
        assert is_ours(conv())


def test_one_inside_the_other_is_as_one() -> None:
    with layers():
        with layers():
            assert is_ours(conv())
        assert is_ours(conv())


def test_other_threads_are_left_alone() -> None:
    found = []
    with layers():
        thread = threading.Thread(target=lambda: found.append(is_ours(conv())))
        thread.start()
        thread.join()
    assert found == [False]


def test_nothing_is_left_behind_after_an_exception() -> None:
    names = {name: getattr(F, name) for name in dir(F)}
    with pytest.raises(ZeroDivisionError), layers():
        assert is_ours(conv() / (1 // 0))
    assert torch._C._len_torch_function_stack() == 0
    assert {name: getattr(F, name) for name in dir(F)} == names
    assert not is_ours(conv())


# ------------------------------------------------------------------ multi-head attention


def same_products(model: nn.Module, run: Callable[[], Tensor]) -> tuple[bool, bool]:
    """Whether the products of a gradient are PyTorch's inside; whether a layer for attention was used, each time."""
    params, results, used = list(model.parameters()), [], []
    for context in (layers(), sdpa_kernel(SDPBackend.MATH)):
        torch.manual_seed(5)
        with context:
            output = run()
        grads = grad(output.square().mean(), params, create_graph=True, allow_unused=True, materialize_grads=True)
        grads = [tensor if tensor.requires_grad else tensor * params[0].sum() for tensor in grads]
        penalty = torch.stack([tensor.square().sum() for tensor in grads]).sum()
        results.append([output, *grads, *grad(penalty, params, allow_unused=True, materialize_grads=True)])
        used.append(uses(output, "Attention") or uses(output, "Softmax"))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11 * max(1, theirs.abs().max().item()))
    return used[0], used[1]


def uses(output: Tensor, name: str) -> bool:
    """Whether the layer with this in its name is in the graph of ``output``."""
    nodes = [output.grad_fn]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        function = getattr(type(node), "_forward_cls", None)
        if function is not None and name in function.__name__:
            return True
        found = {following for following, _ in node.next_functions} - seen
        seen |= found
        nodes += found
    return False


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"dropout": 0.3}, {"add_bias_kv": True, "add_zero_attn": True}, {"kdim": 5, "vdim": 3}],
    ids=["plain", "dropout", "biases", "dimensions"],
)
def test_multi_head_attention_uses_our_layers_inside(options: dict[str, Any], need_weights: bool) -> None:
    model = nn.MultiheadAttention(6, 2, batch_first=True, **options).double()
    query, key, value = draw(3, 4, 6), draw(3, 5, model.kdim), draw(3, 5, model.vdim)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 4] = True
    run = lambda: model(query, key, value, key_padding_mask=padding, need_weights=need_weights)[0]  # noqa: E731
    assert same_products(model, run) == (True, False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("same", ["query, key and value", "key and value", "none"])
def test_no_projection_of_attention_is_taken_apart_by_index(same: str, bias: bool) -> None:
    """The derivative of an index is a tensor of zeros around it."""
    model = nn.MultiheadAttention(6, 2, bias=bias).double()
    query, key = draw(3, 4, 6), draw(3, 4, 6)
    value = draw(3, 4, 6)
    key = query if same == "query, key and value" else key
    value = value if same == "none" else key
    run = lambda: model(query, key, value, need_weights=False)[0]  # noqa: E731
    assert same_products(model, run) == (True, False)
    with layers():
        output = run()
    with Operators() as operators:
        grad(output.sin().sum(), list(model.parameters()))
    assert "aten.select_backward.default" not in operators.names


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_a_transformer_layer_uses_our_layers_inside(norm_first: bool, causal: bool) -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, 0.2, "gelu", batch_first=True, norm_first=norm_first).double()
    inputs = draw(3, 4, 6)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64) if causal else None
    assert same_products(model, lambda: model(inputs, src_mask=mask, is_causal=causal)) == (True, False)


def test_a_transformer_layer_in_evaluation_is_pytorchs() -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).double().eval()
    inputs = draw(3, 4, 6).detach()
    with torch.no_grad():
        expected = model(inputs)
        with layers():
            torch.testing.assert_close(model(inputs), expected, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ checkpoints, autocast, memory


def penalty_step(model: nn.Module, run: Callable[[Tensor], Tensor], differentiate: str) -> list[Tensor]:
    """The gradients of a gradient penalty, taken with the layers on in every pass."""
    params, inputs = list(model.parameters()), torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 4, 6)
    model.zero_grad()
    torch.manual_seed(3)
    with layers():
        grads = grad(run(inputs).square().mean(), params, create_graph=True)
        penalty = torch.stack([tensor.square().sum() for tensor in grads]).sum()
        if differentiate == "grad":
            return list(grad(penalty, params))
        if differentiate == "Tensor.backward":
            penalty.backward()
        else:
            torch.autograd.backward([penalty])
    return [param.grad for param in params if param.grad is not None]


@pytest.mark.parametrize("differentiate", ["grad", "Tensor.backward", "autograd.backward"])
def test_a_checkpoint_recomputes_with_the_same_layers(differentiate: str) -> None:
    model = nn.TransformerEncoderLayer(6, 2, 8, 0.2, "gelu", batch_first=True).double()
    expected = penalty_step(model, model, "grad")
    actual = penalty_step(model, lambda x: checkpoint(model, x, use_reentrant=False), differentiate)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_a_mode_around_sees_differentiation() -> None:
    leaf = draw(3)
    with Recording() as mode, layers():
        leaf.square().sum().backward()
        grad(leaf.square().sum(), leaf)
    assert {Tensor.backward, torch.autograd.grad} <= set(mode.seen)


AUTOCAST: dict[str, Callable[[torch.dtype], Tensor]] = {
    "conv2d": lambda t: F.conv2d(draw(2, 3, 5, 5, dtype=t), draw(4, 3, 3, 3, dtype=t), draw(4, dtype=t)),
    "conv_transpose2d": lambda t: F.conv_transpose2d(draw(2, 3, 5, 5, dtype=t), draw(3, 4, 3, 3, dtype=t)),
    "gelu": lambda t: F.gelu(draw(4, 5, dtype=t)),
    "silu": lambda t: F.silu(draw(4, 5, dtype=t)),
    "softmax": lambda t: F.softmax(draw(4, 5, dtype=t), 1),
    "log_softmax": lambda t: F.log_softmax(draw(4, 5, dtype=t), 1),
    "cross_entropy": lambda t: F.cross_entropy(draw(4, 5, dtype=t), torch.tensor([0, 1, 2, 3])),
    "probabilities": lambda t: F.cross_entropy(draw(4, 5, dtype=t), torch.full((4, 5), 0.2)),
    "attention": lambda t: F.scaled_dot_product_attention(*(draw(2, 2, 3, 4, dtype=t) for _ in range(3))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast_changes_dtypes_as_in_pytorch(name: str, dtype: torch.dtype) -> None:
    results = []
    for context in (layers(), sdpa_kernel(SDPBackend.MATH)):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16), context:
            results.append(AUTOCAST[name](dtype))
    ours, theirs = results
    assert is_ours(ours)
    assert ours.dtype == theirs.dtype
    tolerance = max(TOLERANCE[dtype], TOLERANCE[ours.dtype])
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_autocast_around_everything_differentiates_twice() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(36, 5))
    inputs, results = torch.randn(6, 3, 5, 5), []
    params = list(model.parameters())
    for context in (layers(), sdpa_kernel(SDPBackend.MATH)):
        with torch.autocast("cpu", torch.bfloat16), context:
            loss = F.cross_entropy(model(inputs), torch.arange(6) % 5)
            grads = grad(loss, params, create_graph=True)
            results.append(grad(torch.stack([tensor.square().sum() for tensor in grads]).sum(), params))
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05 * theirs.abs().max().item())


# Where PyTorch has no operator that would record a graph of several backward passes at once.
REFUSING = ("silu", "crossentropy", "scaleddotproductattention")


@over_calls
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_may_be_batched(name: str, create_graph: bool) -> None:
    with layers():
        output = CALLS[name]()
    leaves = leaves_of(output)
    directions = torch.randn(3, *output.shape, dtype=torch.float64)
    if create_graph and any(layer in name.lower().replace("_", "") for layer in REFUSING):
        with pytest.raises(RuntimeError, match="cannot be batched and differentiated again"):
            grad(output, leaves, directions, is_grads_batched=True, retain_graph=True, create_graph=True)
        return
    together = grad(output, leaves, directions, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
    for i, direction in enumerate(directions):
        apart = grad(output, leaves, direction, retain_graph=True)
        torch.testing.assert_close([tensor[i] for tensor in together], list(apart), rtol=1e-11, atol=1e-11)


def leaves_of(output: Tensor) -> list[Tensor]:
    leaves: list[Tensor] = []
    nodes = [output.grad_fn]
    while nodes:
        if (node := nodes.pop()) is not None:
            nodes += [following for following, _ in node.next_functions]
            leaves += [node.variable] if hasattr(node, "variable") else []
    return leaves


@over_calls
def test_a_graph_is_freed_without_the_garbage_collector(name: str) -> None:
    gc.collect()
    gc.disable()
    try:
        with layers():
            output = CALLS[name]()
        leaves = leaves_of(output)
        grads = grad(output.square().sum(), leaves, create_graph=True)
        watched = [weakref.ref(tensor) for tensor in (output, *leaves, *grads)]
        del output, leaves, grads
        assert [reference() for reference in watched] == [None] * len(watched)
    finally:
        gc.enable()


@over_calls
def test_a_tensor_written_after_the_forward_pass_is_noticed(name: str) -> None:
    with layers():
        output = CALLS[name]()
    leaves = leaves_of(output)
    grads = grad(output.square().sum(), leaves, create_graph=True)
    with torch.no_grad():
        for tensor in (output, *leaves):
            tensor.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        grad(grads, leaves, [torch.ones_like(tensor) for tensor in grads])


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: torch.softmax(x, axis=1),
        lambda x, w: x.log_softmax(axis=1),
        lambda x, w: torch.softmax(x, 1, out=None),
        lambda x, w: F.conv2d(x, w, stride=np.int64(2)),
        lambda x, w: F.conv2d(x, w, stride=torch.tensor(2)),
        lambda x, w: F.conv2d(x, w, padding=[np.int64(1)]),
    ],
    ids=["axis", "method", "out", "numpy", "tensor", "list"],
)
def test_arguments_may_be_written_in_every_way_that_pytorch_takes(call: Callable[..., Tensor]) -> None:
    x, w = draw(2, 3, 6, 6), draw(3, 3, 3, 3)
    expected = call(x, w)
    with layers():
        torch.testing.assert_close(call(x, w), expected, rtol=1e-12, atol=1e-12)


def test_a_subclass_differentiates_by_its_own_handler() -> None:
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    leaf = draw(3).detach().as_subclass(Watched).requires_grad_()
    with layers():
        torch.autograd.grad(leaf.square().sum(), leaf)
    assert torch.autograd.grad in seen
