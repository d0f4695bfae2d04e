"""Which back end a name means, and what is said when there is none."""

from __future__ import annotations

import pytest
import torch

from gam_fused import kernels
from gam_fused.kernels import Backend, extension
from gam_fused.kernels.foreach import ForeachBackend
from gam_fused.kernels.reference import ReferenceBackend
from gam_fused.kernels.triton import TritonBackend


@pytest.fixture(autouse=True)
def no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAM_FUSED_BACKEND", raising=False)


@pytest.fixture
def foreach_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ForeachBackend, "unavailable_reason", staticmethod(lambda device=None: "it is broken; mend it.")
    )


def test_a_name_means_its_back_end_and_always_the_same_object() -> None:
    assert type(kernels.resolve("foreach")) is ForeachBackend
    assert type(kernels.resolve("reference")) is ReferenceBackend
    assert kernels.resolve("foreach") is kernels.resolve("foreach")


def test_available_names_each_back_end_with_its_reason(foreach_is_broken: None) -> None:
    reasons = kernels.available()
    assert reasons["foreach"] == "it is broken; mend it."
    assert reasons["reference"] is None
    assert list(reasons)[-1] == "reference"


def test_foreach_and_reference_run_everywhere() -> None:
    assert kernels.available()["foreach"] is None
    assert kernels.available()["reference"] is None


def test_auto_takes_the_first_in_order_of_preference_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fast(ForeachBackend):
        name = "fast"

    class Fastest(ForeachBackend):
        name = "fastest"

        @staticmethod
        def unavailable_reason(device: torch.device | None = None) -> str | None:
            return "not on this machine."

    instances: dict[str, Backend] = {cls.name: cls() for cls in (Fastest, Fast, ForeachBackend)}
    monkeypatch.setattr(kernels, "_PREFERENCE", (Fastest, Fast, ForeachBackend))
    monkeypatch.setattr(kernels, "_INSTANCES", instances)
    assert kernels.resolve() is kernels.resolve("auto") is instances["fast"]


@pytest.fixture(autouse=True)
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without Triton; tests that are about it say otherwise."""
    monkeypatch.setattr(TritonBackend, "unavailable_reason", staticmethod(lambda device=None: "no Triton."))


@pytest.fixture
def triton_everywhere(monkeypatch: pytest.MonkeyPatch, no_triton: None) -> None:
    monkeypatch.setattr(TritonBackend, "unavailable_reason", staticmethod(lambda device=None: None))


@pytest.fixture
def native_everywhere_but_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: "no CUDA kernels.")


@pytest.mark.parametrize(("device", "name"), [("cpu", "native"), ("cuda", "foreach"), ("xpu", "foreach")])
def test_auto_depends_on_the_device(native_everywhere_but_cuda: None, device: str, name: str) -> None:
    assert kernels.resolve("auto", [torch.device(device)]).name == name


def test_auto_takes_a_back_end_that_runs_on_every_device(native_everywhere_but_cuda: None) -> None:
    assert kernels.resolve("auto", [torch.device("cpu"), torch.device("cuda")]).name == "foreach"


def test_auto_takes_native_on_cuda_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: None)
    assert kernels.resolve("auto", [torch.device("cuda")]).name == "native"


@pytest.mark.usefixtures("triton_everywhere")
def test_auto_prefers_native_then_triton_then_foreach_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = [torch.device("cuda")]
    monkeypatch.setattr(extension, "unavailable_reason", lambda: None)
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: None)
    assert kernels.resolve("auto", gpu).name == "native"
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda: "no CUDA kernels.")
    assert kernels.resolve("auto", gpu).name == "triton"
    monkeypatch.setattr(TritonBackend, "unavailable_reason", staticmethod(lambda device=None: "no Triton."))
    assert kernels.resolve("auto", gpu).name == "foreach"
    with pytest.raises(RuntimeError, match=r"^backend='triton' cannot run here: no Triton\.$"):
        kernels.resolve("triton", gpu)


@pytest.mark.usefixtures("triton_everywhere")
def test_auto_never_interprets_triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: "not built.")
    assert kernels.resolve("auto").name == "foreach"
    assert kernels.resolve("auto", [torch.device("cpu")]).name == "foreach"
    assert kernels.resolve("triton", [torch.device("cpu")]).name == "triton"


def test_auto_takes_foreach_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "unavailable_reason", lambda: "not built.")
    assert kernels.resolve("auto").name == "foreach"
    with pytest.raises(RuntimeError, match=r"^backend='native' cannot run here: not built\.$"):
        kernels.resolve("native")


def test_native_is_refused_for_a_device_it_has_no_kernels_for(native_everywhere_but_cuda: None) -> None:
    with pytest.raises(RuntimeError, match=r"^backend='native' cannot run here: no CUDA kernels\.$"):
        kernels.resolve("native", [torch.device("cuda")])


def test_auto_never_takes_the_reference() -> None:
    assert ReferenceBackend not in kernels._PREFERENCE
    assert kernels.resolve("auto").name != "reference"


def test_auto_heeds_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAM_FUSED_BACKEND", "reference")
    assert kernels.resolve("auto").name == "reference"


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_environment_variable_that_names_nothing_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    usual = kernels.resolve("auto")
    monkeypatch.setenv("GAM_FUSED_BACKEND", value)
    assert kernels.resolve("auto") is usual


def test_a_name_outranks_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAM_FUSED_BACKEND", "reference")
    assert kernels.resolve("foreach").name == "foreach"


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    known = ", ".join(repr(name) for name in ("auto", *kernels.available()))
    with pytest.raises(ValueError, match=f"^backend must be one of {known}, got 'fused'.$"):
        kernels.resolve("fused")


def test_an_unknown_name_in_the_environment_is_refused_by_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAM_FUSED_BACKEND", "fused")
    with pytest.raises(ValueError, match=r"^GAM_FUSED_BACKEND must be one of .* got 'fused'\.$"):
        kernels.resolve("auto")


def test_a_back_end_that_cannot_run_is_refused_with_the_reason(foreach_is_broken: None) -> None:
    with pytest.raises(RuntimeError, match=r"^backend='foreach' cannot run here: it is broken; mend it\.$"):
        kernels.resolve("foreach")


def test_a_back_end_from_the_environment_that_cannot_run_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, foreach_is_broken: None
) -> None:
    monkeypatch.setenv("GAM_FUSED_BACKEND", "foreach")
    with pytest.raises(RuntimeError, match=r"^GAM_FUSED_BACKEND='foreach' cannot run here: it is broken"):
        kernels.resolve("auto")
