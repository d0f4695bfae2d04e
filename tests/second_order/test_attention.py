"""Attention: values, gradients and double backward are those of PyTorch's plain form, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from gam_fused.second_order import attention, attention_blocks, layers
from tests.second_order.layers_common import (
    all_derivatives,
    assert_differentiable_twice,
    assert_like_pytorch,
    assert_third_derivative_like_pytorch,
    draw,
    is_ours,
)


def plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """PyTorch's form with a double backward."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(query, key, value, **options)


def functions(options: dict[str, Any]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    layer = attention.scaled_dot_product_attention
    return (lambda q, k, v: layer(q, k, v, **options)), (lambda q, k, v: plain(q, k, v, **options))


@st.composite
def problems(draw_: st.DrawFn) -> tuple[list[Tensor], dict[str, Any]]:
    """(queries, keys and values; options)."""
    pick = lambda *values: draw_(st.sampled_from(values))  # noqa: E731
    batch, heads, rows, columns = pick(0, 1, 2), pick(1, 2, 4), pick(1, 3, 6), pick(1, 4, 6)
    features, out_features = pick(1, 4), pick(0, 3)
    leading = pick((batch, heads), (batch, heads), (heads,), (), (2, batch, heads))
    options: dict[str, Any] = {}
    key_leading = leading
    if leading and pick(False, False, True):
        options["enable_gqa"] = True
        key_leading = (*leading[:-1], pick(1, heads))
        if len(leading) == 1:
            key_leading, options = leading, {}
    if pick(False, True):
        options["scale"] = 0.3
    kind = pick("none", "causal", "bool", "float", "float")
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        whole = (*leading, rows, columns)
        own = [size if pick(True, True, False) else 1 for size in whole[:-1]] + [columns]
        shape = own[pick(0, len(leading)) :]
        mask = torch.randn(shape, dtype=torch.float64)
        options["attn_mask"] = mask > -0.3 if kind == "bool" else mask
        if kind == "float" and pick(False, True):
            mask[torch.rand(shape) < 0.4] = -torch.inf
    if pick(False, False, True):
        options["dropout_p"] = 0.4
    query, key = draw(*leading, rows, features), draw(*key_leading, columns, features)
    value = draw(*key_leading, columns, out_features or features)
    if len(leading) == 2 and pick(True, False):  # as a projection leaves them
        query, key, value = (
            tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for tensor in (query, key, value)
        )
    return [query, key, value], options


@settings(max_examples=120)
@given(problems(), st.sampled_from([1, 40, 1 << 16]))
def test_attention_is_pytorchs(problem: tuple[list[Tensor], dict[str, Any]], block: int) -> None:
    tensors, options = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention_blocks.BLOCK, "cpu", block)
        assert_like_pytorch(*functions(options), tensors)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.tensor([[True, False, True, True], [False] * 4, [True, True, False, False]])},
    "float": {"attn_mask": torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 1, 3, 4)},
    "scale": {"scale": 1.5},
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


@over_kinds
@pytest.mark.parametrize("out_features", [2, 3])
def test_attention_is_differentiable_twice(kind: str, out_features: int) -> None:
    layer, _ = functions(KINDS[kind])
    tensors = [draw(2, 2, 3, 2), draw(2, 2, 4, 2), draw(2, 2, 4, out_features)]
    assert_differentiable_twice(layer, tensors, fast_mode=True)


@over_kinds
def test_third_derivatives_are_pytorchs(kind: str) -> None:
    assert_third_derivative_like_pytorch(
        *functions(KINDS[kind]), [draw(2, 2, 3, 2), draw(2, 2, 4, 2), draw(2, 2, 4, 2)]
    )


def test_third_derivatives_with_dropout_see_the_same_mask() -> None:
    layer, original = functions({"dropout_p": 0.5})

    def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            torch.manual_seed(3)
            return function(*tensors)

        return run

    tensors = [draw(1, 2, 3, 2), draw(1, 2, 4, 2), draw(1, 2, 4, 2)]
    assert_third_derivative_like_pytorch(seeded(layer), seeded(original), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=["plain", "causal", "dropout"])
def test_narrow_floating_numbers_are_pytorchs(dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = [draw(2, 3, 17, 8, dtype=dtype), draw(2, 3, 17, 8, dtype=dtype), draw(2, 3, 17, 8, dtype=dtype)]
    assert_like_pytorch(*functions(options), tensors)


def test_narrow_floating_numbers_are_as_near_the_truth_as_pytorchs() -> None:
    narrow = [draw(2, 3, 40, 16, dtype=torch.bfloat16) for _ in range(3)]
    layer, original = functions({})
    truth = all_derivatives(original, [tensor.detach().double().requires_grad_() for tensor in narrow])
    ours, theirs = all_derivatives(layer, narrow), all_derivatives(original, narrow)
    for name in ("double backward 0", "double backward 1", "double backward 2", "double backward 3"):
        errors = [(found[name].double() - truth[name]).norm() for found in (ours, theirs)]
        assert errors[0] <= 1.1 * errors[1], name


@pytest.mark.parametrize("frozen", ["q", "k", "v", "qk", "qv", "kv"])
def test_what_needs_no_gradient_is_left_out(frozen: str) -> None:
    tensors = [draw(2, 2, 3, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4)]
    for tensor, name in zip(tensors, "qkv", strict=True):
        tensor.requires_grad_(name not in frozen)
    assert_like_pytorch(*functions({}), tensors)
    assert_like_pytorch(*functions({"dropout_p": 0.2}), tensors)


def test_one_tensor_for_queries_keys_and_values_is_pytorchs() -> None:
    layer, original = functions({})
    assert_like_pytorch(lambda x: layer(x, x, x), lambda x: original(x, x, x), [draw(2, 2, 4, 3)])


def test_a_mask_that_is_learned_is_left_to_pytorch() -> None:
    query, mask = draw(1, 2, 3, 4), draw(3, 3)
    with sdpa_kernel(SDPBackend.MATH):
        output = attention.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    assert not is_ours(output)
    assert torch.autograd.grad(output.sum(), mask)[0].any()


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(2, 3, 4), (2, 5, 3), (2, 5, 4)], {}),
        ([(2, 3, 4), (2, 5, 4), (2, 6, 4)], {}),
        ([(2, 3, 4), (2, 5, 4), (2, 5, 4)], {"attn_mask": torch.ones(4, 5, dtype=torch.bool)}),
        ([(2, 3, 4), (2, 5, 4), (2, 5, 4)], {"attn_mask": torch.ones(3, 5, dtype=torch.long)}),
        ([(2, 3, 4), (2, 5, 4), (2, 5, 4)], {"attn_mask": torch.ones(3, 5, dtype=torch.bool), "is_causal": True}),
        ([(1, 4, 3, 4), (1, 3, 5, 4), (1, 3, 5, 4)], {"enable_gqa": True}),
    ],
    ids=["features", "keys", "mask shape", "mask dtype", "two masks", "groups"],
)
def test_an_error_is_pytorchs(shapes: list[tuple[int, ...]], options: dict[str, Any]) -> None:
    tensors = [draw(*shape) for shape in shapes]
    layer, original = functions(options)
    with pytest.raises((RuntimeError, ValueError)) as expected:
        original(*tensors)
    with sdpa_kernel(SDPBackend.MATH), pytest.raises(expected.type) as caught:
        layer(*tensors)
    assert str(caught.value) == str(expected.value)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.ones(60, 60).bool()}], ids=str)
def test_no_tensor_is_larger_than_one_heads_attention_matrix(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention_blocks.BLOCK, "cpu", 1)
    layer, original = functions(options)
    tensors = [draw(2, 3, 60, 4) for _ in range(3)]
    for function, expected in ((layer, 60 * 60), (original, 6 * 60 * 60)):
        with Largest() as seen:
            output = function(*tensors)
            grads = torch.autograd.grad(output, tensors, torch.ones_like(output), create_graph=True)
            torch.autograd.grad(grads, tensors, [torch.ones_like(grad) for grad in grads])
        assert seen.elements == expected


@pytest.mark.parametrize("place", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("layout", ["transposed", "every other element", "expanded"])
def test_any_operand_may_have_gaps_in_its_last_dimension(place: int, layout: str) -> None:
    """The fused kernel takes elements that lie side by side for granted."""
    operands = [draw(2, 3, length, 16).detach() for length in (9, 11, 11)]
    if layout == "transposed":
        operands[place] = operands[place].mT.contiguous().mT
    elif layout == "every other element":
        operands[place] = operands[place].repeat_interleave(2, -1)[..., ::2]
    else:
        operands[place] = operands[place][..., :1].expand(operands[place].shape)
    results = []
    for context in (layers(), sdpa_kernel(SDPBackend.MATH)):
        leaves = [operand.detach().requires_grad_() for operand in operands]
        with context:
            output = F.scaled_dot_product_attention(*leaves)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropping_everything_gives_pytorchs_zeros() -> None:
    operands = [draw(1, 2, 5, 4) for _ in range(3)]
    with layers():
        output = F.scaled_dot_product_attention(*operands, dropout_p=1.0)
    assert torch.equal(output, torch.zeros_like(output))
