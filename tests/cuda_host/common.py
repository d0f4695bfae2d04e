"""What the tests of the kernels share: lists of tensors, calls of norms and fused steps, comparison with float64."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from torch import Tensor

from tests.cuda_host.kernels_on_host import COMPILER, DTYPES, KernelsOnHost

needs_compiler = [
    pytest.mark.slow,  # building takes longer than most tests
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"{COMPILER} is not installed"),
]

CHUNK = 8192
# Around nothing, one pack of 4 and 8, one block's packs and one chunk; several chunks.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 1023, 1025, 0, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
OFFSETS = ([0] * len(SIZES), [i % 3 for i in range(len(SIZES))])
RTOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp64", "fp32", "bf16", "fp16"])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_list(dtype: torch.dtype, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [torch.randn(size, dtype=torch.float64).to(dtype) for size in sizes]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def double(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(torch.float64, copy=True) for tensor in tensors]


def number(value: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(value, dtype=wide(dtype))


def assert_bitwise(actual: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)), (
            f"tensor {i} of {a.numel()} elements"
        )


def assert_rounded(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Float64 results, rounded to the tensors' dtype once."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=RTOL[a.dtype], atol=ATOL[a.dtype])


@dataclasses.dataclass
class Common:
    """What sgd_step and adamw_step have in common."""

    norm: float = 2.0
    rho: float = 0.1
    alpha: float = 0.3
    xi: float = 1e-3
    grad_scale: float | None = None
    found_inf: float | None = None
    lr: float = 0.05
    lr_tensor: float | None = None
    guards: tuple[float, ...] = ()
    maximize: bool = False
    write_grads: bool = True

    def numbers(self) -> list[float]:
        return [self.rho, self.alpha, self.xi, len(self.guards), self.lr, self.maximize, self.write_grads]

    def scalars(self, dtype: torch.dtype) -> list[Tensor | None]:
        float32 = [None if value is None else torch.tensor(value) for value in (self.grad_scale, self.found_inf)]
        lr = None if self.lr_tensor is None else number(self.lr_tensor, dtype)
        return [number(self.norm, dtype), *float32, lr, *(number(guard, dtype) for guard in self.guards)]

    def combined(self, grads: list[Tensor], hvps: list[Tensor]) -> list[Tensor]:
        """The gradient of the whole objective in float64."""
        scale = self.alpha * self.rho / (self.norm + self.xi)
        pairs = zip(double(grads), double(hvps), strict=True)
        return [(g + scale * h) / (self.grad_scale or 1) for g, h in pairs]

    def learning_rate(self) -> float:
        return self.lr if self.lr_tensor is None else self.lr_tensor


def run_sgd(kernels, common, settings, lists, momentum_buffers, *, first_step=False, offsets=None, rounding_seed=None):
    momentum, dampening, decay, nesterov = (
        settings.get(key, 0) for key in ("momentum", "dampening", "weight_decay", "nesterov")
    )
    penalty, rest = common.numbers()[:3], common.numbers()[3:]
    kernels.call(
        "sgd_step",
        [*lists, momentum_buffers] if momentum else lists,
        numbers=[momentum, dampening, decay, nesterov, first_step, *penalty, *rest],
        scalars=common.scalars(lists[0][0].dtype),
        offsets=None if offsets is None else [offsets] * (5 if momentum else 4),
        rounding_seed=rounding_seed,
    )


def run_adamw(kernels, optimizer_class, common, settings, lists, state, *, offsets=None, rounding_seed=None):
    beta1, beta2 = settings.get("betas", (0.9, 0.999))
    decay, amsgrad = settings.get("weight_decay", 0.0), settings.get("amsgrad", False)
    decoupled = optimizer_class is torch.optim.AdamW
    penalty, rest = common.numbers()[:3], common.numbers()[3:]
    moments = [state[key] for key in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else []), "step")]
    kernels.call(
        "adamw_step",
        [*lists, *moments],
        numbers=[beta1, beta2, settings.get("eps", 1e-8), decay, decoupled, amsgrad, *penalty, *rest],
        scalars=common.scalars(lists[0][0].dtype),
        offsets=None if offsets is None else [*[offsets] * (len(lists) + len(moments) - 1), [0] * len(offsets)],
        rounding_seed=rounding_seed,
    )


def norm_of(kernels: KernelsOnHost, tensors: list[Tensor], offsets: list[int] | None = None) -> Tensor:
    result = torch.full((), -1.0, dtype=wide(tensors[0].dtype) if tensors else torch.float32)
    kernels.call(
        "l2_norms",
        [tensors],
        numbers=[len(tensors), 1],
        scalars=[result],
        offsets=None if offsets is None else [offsets],
    )
    return result
