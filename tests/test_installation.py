"""Installing gam_fused: every way, with and without what the native kernels take to build."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from gam_fused.kernels import extension

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "tests" / "installed.py"
NO_COMPILER = {"CXX": "/bin/false"}

# Of the environment that the tests run in, what an environment to install into must not get to see.
NOT_SHARED = re.compile(
    r"gam_fused|__editable__|pip\b|pip-|setuptools|_distutils_hack|distutils|ninja|pybind11|.*\.pth$"
)


class Environment(NamedTuple):
    """A virtual environment that sees PyTorch and what it needs, and nothing that builds."""

    python: Path

    def pip(self, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return run("-m", "pip", "--python", self.python, *arguments, **variables)

    def smoke(self, *options: str, cwd: Path) -> dict[str, object]:
        """What ``installed.py`` found, the source tree out of sight."""
        done = run("-W", "ignore", SMOKE, *options, python=self.python, cwd=cwd)
        assert done.returncode == 0, done.stdout + done.stderr
        report: dict[str, object] = json.loads(done.stdout)
        return report


def run(
    *arguments: str | Path, python: str | Path = sys.executable, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    mine = re.compile("GAM_FUSED_|PYTHON|CUDA_|TORCH_CUDA|CXX|CC$|CFLAGS")
    env = {name: value for name, value in os.environ.items() if not mine.match(name)}
    # Unoptimised: what is tested here is whether it gets compiled.
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=cwd,
        env=env | {"CXXFLAGS": "-O0", "PYTHONDONTWRITEBYTECODE": "1"} | variables,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def torch_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to the installed packages, PyTorch among them; installing it anew would take minutes."""
    folder = tmp_path_factory.mktemp("torch_only")
    for entry in Path(torch.__file__).parents[1].iterdir():
        if not NOT_SHARED.match(entry.name):
            (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``[build-system] requires`` names, fetched once; pip needs no network after that."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints-dev.txt").read_text(encoding="utf-8").splitlines()
    constraints.write_text("\n".join(line for line in lines if re.match("setuptools|ninja|pybind11", line)))
    done = run("-m", "pip", "download", "-q", "--no-deps", "-d", folder, "-r", constraints)
    if done.returncode != 0:
        pytest.skip(f"no package index to be reached: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def environment(tmp_path: Path, torch_only: Path) -> Environment:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    (site_packages,) = home.glob("lib/python*/site-packages")
    (site_packages / "torch_only.pth").write_text(str(torch_only))
    return Environment(home / "bin" / "python")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    tree = tmp_path / "checkout"
    junk = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "*.so", "_native_build.json")
    shutil.copytree(ROOT, tree, ignore=junk)
    return tree


def build(tree: Path, kind: str = "wheel", **variables: str) -> subprocess.CompletedProcess[str]:
    """Build a distribution into ``tree/dist`` with what is installed here, as a front end does without isolation."""
    return run("-c", f"import build_backend; build_backend.build_{kind}('dist')", cwd=tree, **variables)


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# ---------------------------------------------------------------- every way to install


@pytest.mark.slow
def test_pip_install_builds_against_the_torch_that_is_installed(
    environment: Environment, checkout: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    done = environment.pip("install", "--no-index", "-f", wheelhouse, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    report = environment.smoke(cwd=tmp_path)
    assert "site-packages" in str(report["package"])
    assert report["build_info"]["torch"] == torch.__version__  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "no-build-isolation"])
def test_editable_install_runs_from_the_source_tree(
    environment: Environment, checkout: Path, wheelhouse: Path, tmp_path: Path, isolated: bool
) -> None:
    if not isolated:
        assert environment.pip("install", "--no-index", "-f", wheelhouse, "setuptools", "ninja").returncode == 0
    how = [] if isolated else ["--no-build-isolation"]
    path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"  # as when the environment is activated
    done = environment.pip("install", "--no-index", "-f", wheelhouse, *how, "-e", checkout, PATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = environment.smoke(cwd=tmp_path)
    assert str(report["package"]).startswith(str(checkout))


@pytest.mark.slow
def test_sdist_becomes_a_wheel_of_this_platform_that_installs(
    environment: Environment, checkout: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    done = build(checkout, "sdist")
    assert done.returncode == 0, done.stderr
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    options = ["--no-index", "-f", wheelhouse]
    done = environment.pip("wheel", *options, "--no-deps", "-w", tmp_path / "wheels", sdist)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert re.search(f"-{version}-{version}-(linux|macosx)_", wheel.name)
    assert environment.pip("install", *options, wheel).returncode == 0
    environment.smoke(cwd=tmp_path)


# ---------------------------------------------------------------- what cannot be built


@pytest.mark.slow
def test_without_a_compiler_the_package_installs_and_says_why_it_has_no_native_kernels(
    environment: Environment, checkout: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    done = environment.pip("install", "-v", "--no-index", "-f", wheelhouse, checkout, **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    reason = str(environment.smoke("--pure", cwd=tmp_path)["reason"])
    assert "without its native kernels: the C++ compiler '/bin/false' does not compile" in reason
    assert reason in done.stdout + done.stderr


@pytest.mark.slow
def test_without_torch_the_package_builds_and_says_why_it_has_no_native_kernels(
    checkout: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    bare = Environment(tmp_path / "bare" / "bin" / "python")
    venv.create(bare.python.parents[1], with_pip=False, symlinks=True)
    options = ["--no-index", "-f", wheelhouse]
    assert bare.pip("install", *options, "setuptools").returncode == 0
    done = bare.pip("wheel", *options, "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    assert "install torch>=2.10 first" in json.loads(files(wheel)["gam_fused/_native_build.json"])["_C"]


@pytest.mark.slow
def test_sources_that_do_not_compile_are_told_or_an_error(checkout: Path) -> None:
    (checkout / "csrc" / "module.cpp").write_text("#error wrong\n")
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    assert "gam_fused was installed without its native kernels: its sources did not compile" in done.stderr
    done = build(checkout, GAM_FUSED_NATIVE="1")
    assert done.returncode != 0
    assert "GAM_FUSED_NATIVE=1 asks for gam_fused._C, which cannot be built" in done.stderr


@pytest.mark.slow
def test_a_release_of_pytorch_that_direct_calls_do_not_compile_with_leaves_the_kernels(checkout: Path) -> None:
    """Those of CUDA, too, which ask for no direct calls when they are asked for themselves."""
    (checkout / "csrc" / "direct" / "tensor_access.cpp").write_text("#error wrong\n")
    with_cuda = {"GAM_FUSED_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0"} if shutil.which("nvcc") else {}
    done = build(checkout, **with_cuda)
    assert done.returncode == 0, done.stderr
    reason = "gam_fused was installed without its calls past PyTorch's dispatcher: its sources did not compile"
    assert reason in done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    held = files(wheel)
    extensions = sorted(name.split(".")[0] for name in held if name.endswith(".so"))
    assert extensions == ["gam_fused/_C", *(["gam_fused/_C_cuda"] if with_cuda else [])]
    assert reason in json.loads(held["gam_fused/_native_build.json"])["_C_direct"]
    done = build(checkout, GAM_FUSED_NATIVE="1")
    assert done.returncode != 0
    assert "GAM_FUSED_NATIVE=1 asks for gam_fused._C_direct, which cannot be built" in done.stderr


def test_an_extension_left_over_from_another_build_does_not_get_into_the_wheel(checkout: Path) -> None:
    assert build(checkout, **NO_COMPILER).returncode == 0
    (lib,) = (checkout / "build").glob("lib*")
    for folder in (lib / "gam_fused", checkout / "gam_fused"):
        (folder / "_C_cuda.so").touch()
    assert build(checkout, **NO_COMPILER).returncode == 0
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert not [name for name in files(wheel) if name.endswith(".so")]


# Each fails before anything is compiled.
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (NO_COMPILER | {"GAM_FUSED_NATIVE": "1"}, "GAM_FUSED_NATIVE=1 asks for gam_fused._C, which cannot be built"),
        ({"GAM_FUSED_NATIVE": "1", "CXX": "/nowhere/c++"}, "there is no C++ compiler '/nowhere/c++'"),
        (NO_COMPILER | {"GAM_FUSED_CUDA": "1"}, "GAM_FUSED_CUDA=1 asks for gam_fused._C, which cannot be built"),
        (
            {"GAM_FUSED_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "GAM_FUSED_CUDA=1 asks for gam_fused._C_cuda, which cannot be built: there is no working CUDA compiler at "
            "/nowhere/bin/nvcc; install the CUDA toolkit or set CUDA_HOME",
        ),
        ({"GAM_FUSED_CUDA": "1", "GAM_FUSED_NATIVE": "0"}, "unset one of them"),
        ({"GAM_FUSED_CUDA": "yes"}, "GAM_FUSED_CUDA must be 0, 1 or unset, got 'yes'"),
    ],
    ids=["broken-compiler", "no-compiler", "cuda-no-compiler", "cuda-no-toolkit", "contradiction", "not-a-switch"],
)
def test_what_is_asked_for_and_cannot_be_had_is_an_error(
    checkout: Path, variables: dict[str, str], message: str
) -> None:
    done = build(checkout, **variables)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.slow
def test_cuda_kernels_are_left_out_on_request(checkout: Path) -> None:
    done = build(checkout, GAM_FUSED_CUDA="0", GAM_FUSED_NATIVE="1")
    assert done.returncode == 0, done.stderr
    (wheel,) = (checkout / "dist").glob("*.whl")
    held = files(wheel)
    assert [name for name in held if name.startswith("gam_fused/_C.")]
    assert [name for name in held if name.startswith("gam_fused/_C_direct.")]
    assert not [name for name in held if name.startswith("gam_fused/_C_cuda.")]
    assert json.loads(held["gam_fused/_native_build.json"]) == {
        "_C_cuda": "gam_fused was installed without its CUDA kernels: it was built with GAM_FUSED_CUDA=0."
    }


def test_without_native_kernels_on_request_the_wheel_is_for_every_platform(checkout: Path) -> None:
    assert build(checkout, GAM_FUSED_NATIVE="0").returncode == 0
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


# ---------------------------------------------------------------- which PyTorch it is built against


def test_isolated_build_asks_for_torch_only_where_there_is_none_around_it(
    environment: Environment, torch_only: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False, symlinks=True)
    setuptools = Path(sys.modules["setuptools"].__file__ or "").parents[1] if "setuptools" in sys.modules else None
    overlay = tmp_path / "overlay"  # what pip shows to an isolated build, through PYTHONPATH, in place of the rest
    overlay.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        source = (setuptools or Path(torch.__file__).parents[1]) / name
        (overlay / name).symlink_to(source)
    (overlay / "sitecustomize.py").write_text(
        f"import sys; sys.path = [p for p in sys.path if p != {str(torch_only)!r}]"
    )
    script = (
        "import build_backend as b; print(b._missing_torch()); import importlib.util as u; print(u.find_spec('torch'))"
    )

    def asked(python: Path, **variables: str) -> list[str]:
        done = run("-c", script, python=python, cwd=ROOT, PYTHONPATH=str(overlay), **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    requires, found = asked(environment.python)
    assert requires == "[]"
    assert str(torch_only) in found
    assert asked(bare / "bin" / "python") == ["['torch>=2.10']", "None"]
    assert asked(bare / "bin" / "python", GAM_FUSED_NATIVE="0") == ["[]", "None"]


@pytest.mark.skipif(extension.unavailable_reason() is not None, reason=str(extension.unavailable_reason()))
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_extension_takes_from_torch_only_what_stays_the_same_from_release_to_release() -> None:
    from gam_fused import _C

    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", _C.__file__], capture_output=True, text=True, check=True
    )
    names = {line.split(maxsplit=1)[1] for line in listed.stdout.splitlines()}
    assert [name for name in names if name.startswith(("aoti_torch_", "torch_"))]
    unstable = re.compile(r"\b(c10|at|caffe2|torch|THP\w+)\b::|^THP|_ZN3c10")
    assert not [name for name in names if unstable.search(name)]
    needed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch_python" not in needed
