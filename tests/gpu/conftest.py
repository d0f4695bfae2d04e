"""What the tests of this folder get. They need nothing but pytest and torch, so that they run on a bare GPU machine:

pytest --confcutdir=tests/gpu tests/gpu
"""

from __future__ import annotations

import pytest
import torch

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.triton import TritonBackend
from tests.interpreter import wrap_the_language_once

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


if TritonBackend.unavailable_reason(torch.device("cpu")) is None:
    wrap_the_language_once()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=list(DTYPES.values()), ids=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test can be run; what it says of the CPU is what it will ask of a GPU."""
    return torch.device(request.param)


@pytest.fixture(params=["native", "triton"])
def compiled(request: pytest.FixtureRequest) -> Backend:
    """A back end of kernels, if it runs on the test's device: that of the ``device`` fixture, or else CUDA."""
    chosen = request.getfixturevalue("device") if "device" in request.fixturenames else torch.device("cuda")
    try:
        return kernels.resolve(request.param, [chosen])
    except RuntimeError as error:
        pytest.skip(str(error))
