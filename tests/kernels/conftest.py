"""Which back ends, dtypes and devices the operators are tested on. A new back end is one more name in BACKENDS."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.triton import TritonBackend
from tests.interpreter import wrap_the_language_once

BACKENDS = ("native", "triton", "foreach", "reference")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


if TritonBackend.unavailable_reason(torch.device("cpu")) is None:
    wrap_the_language_once()


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    reason = kernels.available()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return kernels.resolve(request.param)


@pytest.fixture(scope="session", params=list(DTYPES.values()), ids=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def runs_on_the_device(request: pytest.FixtureRequest) -> None:
    """A back end runs where the test's tensors are: on the CPU, unless the test asks for a device."""
    names = [name for name in ("backend", "fusing") if name in request.fixturenames]
    device = request.getfixturevalue("device") if "device" in request.fixturenames else torch.device("cpu")
    for name in names:
        reason = request.getfixturevalue(name).unavailable_reason(device)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """A test may set the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
