"""The kernels as these tests run them: their own sources, built for the CPU in two ways.

One build has AddressSanitizer and UndefinedBehaviorSanitizer and room for few tensors in a launch, so that short lists
take several launches; the other has ThreadSanitizer and the launches of a device.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_host.kernels_on_host import ADDRESS, THREAD, KernelsOnHost, build, mutated


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str, worker_id: str) -> Path:
    """The same folder for all workers of one run."""
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / name


@pytest.fixture(scope="session")
def worker_id(request: pytest.FixtureRequest) -> str:
    return getattr(request.config, "workerinput", {}).get("workerid", "master")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> KernelsOnHost:
    """With AddressSanitizer; a launch takes the tensors that fit into 800 bytes: 14 in one list, 3 in eight."""
    small_tables = mutated(
        tmp_path_factory.mktemp("small_tables"),
        "chunk_plan.h",
        "kKernelParameterBytes = 32764",
        "kKernelParameterBytes = 800",
    )
    return build(shared_folder(tmp_path_factory, "address", worker_id), ADDRESS, small_tables)


@pytest.fixture(scope="session")
def threads(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> KernelsOnHost:
    """With ThreadSanitizer."""
    return build(shared_folder(tmp_path_factory, "thread", worker_id), THREAD)
