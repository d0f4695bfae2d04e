"""What every test gets: the same random numbers each time, one thread per worker, no CUDA test without a device."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch


class TorchRandom:
    """PyTorch's generators as Hypothesis wants them, so that a failing example fails again when it is replayed."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


torch_random = TorchRandom()  # Hypothesis keeps only a weak reference
hypothesis.register_random(torch_random)

# No deadline: the first example of a test pays for whatever torch sets up lazily. No database: it would make one run
# depend on the last. New examples in each run find new bugs at a desk; in CI the same commit gives the same result.
hypothesis.settings.register_profile(
    "gam-fused",
    deadline=None,
    database=None,
    derandomize="CI" in os.environ,
    # For tests that only ask whether another one fails: looking for the smallest example takes minutes.
    phases=[
        phase for phase in hypothesis.Phase if "HYPOTHESIS_NO_SHRINK" not in os.environ or phase.name == "generate"
    ],
)
hypothesis.settings.load_profile("gam-fused")


def pytest_configure() -> None:
    # Tensors here are small: a second thread costs more than it gives, and ten times that on a busy machine.
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'not built in'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """A process that was started in the background ignores SIGINT until somebody asks for it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
