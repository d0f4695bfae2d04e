"""What is shipped, what it depends on, and which module may import which."""

from __future__ import annotations

import ast
import email
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

import gam_fused

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gam_fused"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Of what lies beside the package, the sdist takes what a reader, a builder or a tester of it needs.
BESIDE_THE_PACKAGE = {
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "build_backend.py",
    "constraints-dev.txt",
    "docs/support.md",
    "pyproject.toml",
    "setup.py",
}
JUNK = [
    ".venv/pyvenv.cfg",
    "build/temp/csrc/ops.o",
    "csrc/ops.o",
    "demo/sgd/log.csv",
    "gam_fused/_C.cpython-311-x86_64-linux-gnu.so",
    "gam_fused/_native_build.json",
    "gam_fused/__pycache__/gam.cpython-311.pyc",
    "gam_fused/kernels/checkpoint.tmp",
    "runs/checkpoint.pt",
    "tests/__pycache__/conftest.cpython-311.pyc",
    "tests/.hypothesis/examples",
]

# Imports run one way: a module imports from its own layer and from those below. Whatever is not named here is one of
# the parts that the algorithm is put together from (closures, derivatives, …).
LAYERS = ({"_version"}, {"kernels", "second_order"}, {"PARTS"}, {"gam", "accelerated", "flatness"}, {"__init__"})
ON_TOP = {"cli", "integrations"}
# Packages that only some users have. All of gam_fused below ON_TOP works without them.
OPTIONAL = {"lightning", "matplotlib", "numpy", "rich", "sklearn", "tensorboard", "transformers", "triton", "typer"}

# Written in Triton's language, and imported where they are launched.
IN_TRITON = (
    "gam_fused.kernels.triton_kernels",
    "gam_fused.kernels.triton_rules",
    "gam_fused.second_order.triton_kernels",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def component(module: str) -> str:
    """``gam_fused.kernels.foreach`` → ``kernels``; ``gam_fused`` → ``__init__``."""
    return [*module.split("."), "__init__"][1]


def layer(module: str) -> int:
    name = component(module)
    if name in ON_TOP:
        return len(LAYERS)
    return next((i for i, names in enumerate(LAYERS) if name in names), LAYERS.index({"PARTS"}))


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in the file, as far as the file itself tells."""
    package = (module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                member = f"{source}.{alias.name}"
                target = ROOT.joinpath(*member.split("."))
                yield member if target.is_dir() or target.with_suffix(".py").exists() else source


def build(source: Path, kind: str, into: Path) -> Path:
    """Build ``sdist`` or ``wheel`` as a build front end does, with the setuptools that is installed.

    Without native kernels; test_installation.py has those.
    """
    script = f"import sys, build_backend; print(build_backend.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", script, into],
        cwd=source,
        env=os.environ | {"GAM_FUSED_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a working tree in which somebody has trained, tested and crashed."""
    tree = tmp_path_factory.mktemp("tree") / "checkout"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "*.so")
    )
    for name in JUNK:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"junk")
    return build(tree, "sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from nothing but the sdist."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return build(next(unpacked.iterdir()), "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def shipped_sources() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in [*SOURCES, PACKAGE / "py.typed"]}


def test_sdist_holds_the_package_its_tests_and_no_junk(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in (member.name for member in archive if member.isfile())}
    written_by_setuptools = {name for name in held if name in {"PKG-INFO", "setup.cfg"} or ".egg-info/" in name}
    sources = {"*.py", "*.sh", "*.h", "*.cuh", "*.inl", "*.cpp", "*.cu"}
    folders = [ROOT / name for name in ("benchmarks", "csrc", "scripts", "tests")]
    others = {p.relative_to(ROOT).as_posix() for folder in folders for kind in sources for p in folder.rglob(kind)}
    assert held - written_by_setuptools == shipped_sources() | others | BESIDE_THE_PACKAGE


def test_wheel_from_the_sdist_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    assert {name for name in held if ".dist-info/" not in name} == shipped_sources()
    assert any(name.endswith("/licenses/LICENSE") for name in held)


def test_every_folder_of_modules_is_a_package() -> None:
    assert {path.parent for path in SOURCES} == {path.parent for path in SOURCES if path.name == "__init__.py"}


def test_torch_is_the_only_unconditional_dependency(metadata: Message) -> None:
    requirements = metadata.get_all("Requires-Dist", [])
    assert [line for line in requirements if "extra ==" not in line] == ["torch>=2.10"]
    assert metadata.get_all("Provides-Extra") == ["bench", "cli", "dev"]


def test_metadata_states_version_licence_and_python(metadata: Message) -> None:
    assert metadata["Name"] == "gam-fused"
    assert metadata["Version"] == gam_fused.__version__
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata["Requires-Python"] == ">=3.10"


def test_imports_without_any_optional_package() -> None:
    modules = [module_name(path) for path in SOURCES if component(module_name(path)) not in ON_TOP]
    modules = [module for module in modules if not module.startswith(IN_TRITON)]
    script = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for module in {modules!r}:
    importlib.import_module(module)
"""
    # torch itself warns when numpy is absent; that is its own business.
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    module = module_name(path)
    upward = {name for name in imports(path) if name.split(".")[0] == "gam_fused" and layer(name) > layer(module)}
    assert not upward, f"{module} imports from a layer above its own"


def test_reference_imports_only_torch_and_is_imported_by_nothing() -> None:
    outside = {name.split(".")[0] for name in imports(PACKAGE / "reference.py")}
    assert outside - sys.stdlib_module_names == {"torch"}
    assert not [str(path) for path in SOURCES if "gam_fused.reference" in imports(path)]
