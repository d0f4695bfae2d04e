"""Which back ends the fused base rules are tested on."""

from __future__ import annotations

import pytest

from gam_fused import kernels
from gam_fused.kernels import Backend
from gam_fused.kernels.interface import FusingBackend
from tests.kernels.conftest import BACKENDS

# Without those that run here and have no fused base rules.
FUSING = [
    name
    for name in BACKENDS
    if kernels.available()[name] is not None or isinstance(kernels.resolve(name), FusingBackend)
]


@pytest.fixture(scope="session", params=FUSING)
def fusing(request: pytest.FixtureRequest) -> Backend:
    reason = kernels.available()[request.param]
    if reason is not None:
        pytest.skip(reason)
    return kernels.resolve(request.param)
