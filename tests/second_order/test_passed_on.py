"""Calls that are left to PyTorch's own functions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from gam_fused.second_order.rms_norm import rms_norm
from tests.second_order.common import LARGER, Case, is_ours, over


@over(LARGER)
def test_without_a_graph(case: Case) -> None:
    tensors = case.tensors()
    assert is_ours(case.ours(*tensors))
    with torch.no_grad():
        assert torch.equal(case.ours(*tensors), case.theirs(*tensors))
    with torch.inference_mode():
        assert torch.equal(case.ours(*tensors), case.theirs(*tensors))
    constant = [t.detach() for t in tensors]
    assert case.ours(*constant).grad_fn is None
    assert torch.equal(case.ours(*constant), case.theirs(*constant))


@over(LARGER)
def test_while_compiling(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case.tensors()
    assert is_ours(case.ours(*tensors))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not is_ours(case.ours(*tensors))


@over(LARGER)
def test_without_elements(case: Case) -> None:
    x, *parameters = case.tensors()
    empty = x.detach()[:0].requires_grad_()
    try:
        expected = case.theirs(empty, *parameters)
    except (RuntimeError, ValueError, IndexError) as error:
        with pytest.raises(type(error)):
            case.ours(empty, *parameters)
        return
    output = case.ours(empty, *parameters)
    assert not is_ours(output)
    assert output.shape == expected.shape
    grads = torch.autograd.grad(output.sum(), [empty, *parameters], allow_unused=True)
    others = torch.autograd.grad(expected.sum(), [empty, *parameters], allow_unused=True)
    for one, other in zip(grads, others, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@over(LARGER)
def test_under_function_transforms(case: Case) -> None:
    x, *parameters = (t.detach() for t in case.tensors())

    def loss(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, *parameters).tanh().sum()

    x.requires_grad_()  # what a transform makes of it does, too
    found, expected = (torch.func.grad(loss(function))(x) for function in (case.ours, case.theirs))
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of PyTorch's decompositions
@over({name: case for name, case in LARGER.items() if name not in ("batch_norm", "batch_norm-2d", "instance_norm")})
def test_in_forward_mode(case: Case) -> None:
    tensors = case.tensors()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(tensors[0], torch.ones_like(tensors[0]))
        outputs = [forward_ad.unpack_dual(f(dual, *tensors[1:])) for f in (case.ours, case.theirs)]
        assert outputs[0].tangent is not None
        assert torch.equal(outputs[0].tangent, outputs[1].tangent)


class Marked(Tensor):
    """A subclass whose type operators keep."""


@over(LARGER)
def test_subclasses(case: Case) -> None:
    x, *parameters = case.tensors()
    marked = x.detach().as_subclass(Marked).requires_grad_()
    output = case.ours(marked, *parameters)
    assert type(output) is Marked
    assert not is_ours(output)


@over(LARGER)
def test_complex_and_integer_inputs(case: Case) -> None:
    x, *parameters = case.tensors()
    for dtype in (torch.complex128, torch.int64):
        raised = []
        for function in (case.ours, case.theirs):
            try:
                output = function(x.detach().to(dtype), *parameters)
                assert not is_ours(output)
                raised.append("nothing")
            except (RuntimeError, NotImplementedError) as error:
                raised.append(str(error))
        assert raised[0] == raised[1]


@over({name: case for name, case in LARGER.items() if name != "batch_norm-eval"})  # its statistics have one dtype
def test_autocast_decides_the_dtype_as_it_does_in_pytorch(case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, *parameters = case.tensors()
        tensors = [x.detach().to(dtype).requires_grad_(), *(p.detach().float().requires_grad_() for p in parameters)]
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = case.ours(*tensors), case.theirs(*tensors)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", [LARGER["layer_norm"]], ids=["layer_norm"])
def test_parameters_of_a_dtype_that_pytorch_refuses(case: Case) -> None:
    x, w, b = case.tensors()
    with pytest.raises(RuntimeError) as theirs:
        F.layer_norm(x.float(), [130], w, b)
    with pytest.raises(RuntimeError) as ours:
        case.ours(x.float(), w, b)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_rms_norm_of_two_dtypes() -> None:
    x = torch.randn(3, 8).bfloat16().requires_grad_()
    w = torch.randn(8, requires_grad=True)
    output = rms_norm(x, [8], w)
    assert not is_ours(output)
    assert torch.equal(output, F.rms_norm(x, [8], w))


@over({name: LARGER[name] for name in ("group_norm", "layer_norm", "rms_norm")})
def test_what_autocast_may_cast(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_ours(case.ours(*case.tensors(torch.bfloat16)))
        assert is_ours(case.ours(*case.tensors(torch.float32)))
    assert is_ours(case.ours(*case.tensors(torch.bfloat16)))
