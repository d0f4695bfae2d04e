"""Builds the extensions.

``gam_fused._C`` (operators, CPU kernels) and ``gam_fused._C_cuda`` (CUDA kernels) use PyTorch's stable ABI only: they
run beside every PyTorch from ``ABI`` on, whichever one they are built against. ``gam_fused._C_direct`` (calls past
PyTorch's dispatcher) uses what changes with every release, and serves beside the one only that it is built against.
Metadata is in ``pyproject.toml``. The environment decides what is built:

    GAM_FUSED_NATIVE      1: an extension that cannot be built is an error; 0: build none; unset: build what can be
                          built, and install without the rest
    GAM_FUSED_CUDA        1: build the CUDA kernels or fail; 0: do not; unset: where PyTorch has CUDA and nvcc is found
    CUDA_HOME             where the CUDA toolkit is; else around the nvcc on PATH, else /usr/local/cuda
    TORCH_CUDA_ARCH_LIST  which GPUs to build for, such as "8.0;9.0+PTX"
    CXX, CXXFLAGS         the C++ compiler, and flags for it that come after those below
    MAX_JOBS              how many compilers run at a time
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as plain_build_ext
from setuptools.errors import SetupError

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # front ends that build in process do not
import build_backend  # noqa: E402

ABI = "2.10"
ABI_MACRO = "-DTORCH_TARGET_VERSION=0x020a000000000000"
RECORD = Path("gam_fused", "_native_build.json")  # read by gam_fused/kernels/extension.py

# Rounding is part of what the kernels promise, so nothing that reorders or contracts arithmetic. No -std: PyTorch adds
# the one that its headers are written for, C++17 in 2.10, C++20 in 2.13.
CXX_FLAGS = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra"]
NVCC_FLAGS = ["-O3", "--fmad=false", "-DUSE_CUDA", "-Xcompiler", ",".join(["-fvisibility=hidden", *WARNINGS])]


def switch(name: str) -> bool | None:
    """The environment variable as on, off or unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"error: {name} must be 0, 1 or unset, got {value!r}")
    return bool(int(value)) if value else None


NATIVE = switch("GAM_FUSED_NATIVE")
CUDA = switch("GAM_FUSED_CUDA")
if NATIVE is False and CUDA:
    raise SystemExit("error: GAM_FUSED_CUDA=1 asks for CUDA kernels and GAM_FUSED_NATIVE=0 for none; unset one of them")


class Unbuildable(Exception):
    """Why an extension cannot be built, and what to do about it."""


class NotCompiled(Unbuildable):
    """Everything was there, and it still failed."""


class NotWanted(Unbuildable):
    """Nothing asks for the extension."""


# ---------------------------------------------------------------- what is there to build with


def check_compiler() -> None:
    if sys.platform == "win32":
        raise Unbuildable("the native kernels are not built on Windows")
    compiler = os.environ.get("CXX", "c++")  # as PyTorch's build_ext chooses it
    include = sysconfig.get_paths()["include"]
    command = [*shlex.split(compiler), "-x", "c++", "-fsyntax-only", f"-I{include}", "-"]
    source = "#include <vector>\n#include <Python.h>\nint main() { return 0; }\n"
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True)
    except OSError:
        raise Unbuildable(
            f"there is no C++ compiler {compiler!r}; install one (Debian, Ubuntu: apt-get install g++) or set CXX"
        ) from None
    if done.returncode == 0:
        return
    if "Python.h" in done.stderr:
        raise Unbuildable("Python's C headers are missing (Debian, Ubuntu: apt-get install python3-dev)")
    said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
    raise Unbuildable(f"the C++ compiler {compiler!r} does not compile an empty program: {said}")


def import_torch() -> None:
    build_backend.make_torch_importable()
    try:
        import torch  # noqa: F401
    except Exception as error:  # missing, or its libraries are
        raise Unbuildable(
            f"PyTorch, whose headers the build needs, does not import ({error}); install torch>={ABI} first"
        ) from None


def cuda_toolkit() -> tuple[str, str]:
    """Where the CUDA toolkit is, and its version."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if not home:
        on_path = shutil.which("nvcc")
        folder = Path(on_path).resolve().parents[1] if on_path else None
        # The nvcc on PATH may be a script that calls one elsewhere; the toolkit is where the headers are.
        home = str(folder if folder and (folder / "include" / "cuda_runtime.h").exists() else "/usr/local/cuda")
    nvcc = Path(home, "bin", "nvcc")
    try:
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise Unbuildable(
            f"there is no working CUDA compiler at {nvcc}; install the CUDA toolkit or set CUDA_HOME"
        ) from None
    version = re.search(r"release (\d+\.\d+)", said)
    if version is None:
        raise Unbuildable(f"{nvcc} --version does not say which release it is")
    return home, version.group(1)


# ---------------------------------------------------------------- the extensions


def macros(**values: str) -> list[str]:
    quoted = {name: value.replace("\\", "\\\\").replace('"', '\\"') for name, value in values.items()}
    return [f'-DGAM_FUSED_{name}="{value}"' for name, value in quoted.items()]


def cxx_flags(*more: str) -> list[str]:
    """For the C++ compiler, with what build_info() says as macros."""
    import torch

    version = re.search(r'"(.+)"', (HERE / "gam_fused" / "_version.py").read_text(encoding="utf-8").split("=")[1])
    flags = [*CXX_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    identity = macros(VERSION=version.group(1), TORCH=torch.__version__, ABI=ABI, FLAGS=shlex.join(flags))
    return [*more, *identity, *WARNINGS, *flags]


def includes(device: str) -> list[str]:
    """Where the headers of others are; as system headers, whose warnings are not ours to mend."""
    from torch.utils.cpp_extension import include_paths

    folders = include_paths(device)
    try:
        import pybind11

        folders.insert(0, pybind11.get_include())
    except ImportError:  # a build without isolation; PyTorch carries a copy
        pass
    return [argument for folder in folders for argument in ("-isystem", folder)]


def cpu_extension() -> Extension:
    from torch.utils.cpp_extension import library_paths

    return Extension(
        "gam_fused._C",
        ["csrc/ops.cpp", "csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp") + glob("csrc/second_order/*.cpp"))],
        library_dirs=library_paths("cpu"),
        libraries=["torch_cpu"],  # not torch_python: that one's interface changes with every release
        extra_compile_args={"cxx": cxx_flags(ABI_MACRO, *includes("cpu"))},
        language="c++",
    )


def cuda_extension() -> Extension:
    import torch
    from torch.utils import cpp_extension

    if CUDA is False:
        raise NotWanted("it was built with GAM_FUSED_CUDA=0")
    if CUDA is None and torch.version.cuda is None:
        raise NotWanted(f"it was built against PyTorch {torch.__version__}, which has no CUDA")
    home, version = cuda_toolkit()
    # Left to itself, PyTorch looks at the GPUs of the machine that builds, and crashes where there are none.
    blackwell = ";10.0;12.0" if tuple(map(int, version.split("."))) >= (12, 8) else ""
    architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;9.0{blackwell}+PTX")
    cpp_extension.CUDA_HOME = home  # None where PyTorch has no CUDA; its stable headers serve all the same
    return Extension(
        "gam_fused._C_cuda",
        ["csrc/ops_cuda.cpp", "csrc/cuda_module.cpp", *sorted(glob("csrc/cuda/*.cu"))],
        library_dirs=[*cpp_extension.library_paths("cpu"), f"{home}/lib64", f"{home}/lib"],
        libraries=["torch_cpu", "cudart"],
        # libtorch depends on libtorch_cuda where there is one. Naming it instead would demand it at build time, and
        # build against a PyTorch without CUDA, good enough for a wheel that is to run beside one with CUDA, would fail.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
        extra_compile_args={
            "cxx": cxx_flags(
                *(ABI_MACRO, "-DUSE_CUDA", *includes("cuda")),
                *macros(CUDA=version, ARCHITECTURES=architectures),
            ),
            "nvcc": [ABI_MACRO, *NVCC_FLAGS, *includes("cuda")],
        },
        language="c++",
    )


def direct_extension() -> Extension:
    from torch.utils.cpp_extension import library_paths

    return Extension(
        "gam_fused._C_direct",
        ["csrc/direct/tensor_access.cpp"],
        library_dirs=library_paths("cpu"),
        libraries=["torch_python", "torch_cpu", "c10"],
        extra_compile_args={"cxx": cxx_flags(*includes("cpu"))},  # without the limits of the stable ABI
        language="c++",
    )


# ---------------------------------------------------------------- building them


def plan() -> tuple[list[Extension], dict[str, Unbuildable]]:
    """The extensions, and why those that cannot be built cannot; these are declared all the same, without sources."""
    makers = {
        "gam_fused._C": cpu_extension,
        "gam_fused._C_cuda": cuda_extension,
        "gam_fused._C_direct": direct_extension,
    }
    try:
        check_compiler()
        import_torch()
    except Unbuildable as problem:
        return [Extension(name, []) for name in makers], dict.fromkeys(makers, problem)
    extensions, problems = [], {}
    for name, make in makers.items():
        try:
            extensions.append(make())
        except Unbuildable as problem:
            extensions.append(Extension(name, []))
            problems[name] = problem
    return extensions, problems


def command(problems: dict[str, Unbuildable]) -> type[plain_build_ext]:
    """PyTorch's ``build_ext``, where there is one, that builds each extension by itself and notes what went wrong."""
    base = plain_build_ext
    if "torch" in sys.modules:
        from torch.utils.cpp_extension import BuildExtension as base

    class BuildExt(base):
        def run(self) -> None:
            # An extension left over from another build, perhaps with CUDA, must not get into this one.
            for folder in [Path(self.build_lib), *([HERE] if self.inplace else [])]:
                for old in [folder / RECORD, *folder.glob("gam_fused/_C*.so")]:
                    old.unlink(missing_ok=True)
            super().run()
            if self.inplace:
                shutil.copyfile(Path(self.build_lib) / RECORD, HERE / RECORD)

        def build_extensions(self) -> None:
            os.environ.setdefault("MAX_JOBS", str(usable_cpus()))  # ninja would take two more than there are
            for name, problem in problems.items():
                fail_if_asked_for(name, problem)
            built = []
            for extension in self.extensions:
                problem = problems.get(extension.name) or self.build_alone(extension)
                if problem is None:
                    built.append(extension)
                    continue
                fail_if_asked_for(extension.name, problem)
                tell(extension.name, problem)
                problems[extension.name] = problem
                if extension.name == "gam_fused._C":  # it defines the operators that the others are for
                    problems.update(dict.fromkeys(("gam_fused._C_cuda", "gam_fused._C_direct"), problem))
                    break
            self.extensions = built
            record = Path(self.build_lib) / RECORD
            record.parent.mkdir(parents=True, exist_ok=True)
            lines = {name.rpartition(".")[2]: sentence(name, problem) for name, problem in problems.items()}
            record.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")

        def build_alone(self, extension: Extension) -> Unbuildable | None:
            vars(self.compiler).pop("compile", None)  # PyTorch's build_ext wraps these anew each time
            vars(self.compiler).pop("_compile", None)
            everything, self.extensions = self.extensions, [extension]
            try:
                super().build_extensions()
            except Exception as error:  # PyTorch's, ninja's or distutils'
                said = " ".join(str(error).split())
                return NotCompiled(
                    f"its sources did not compile ({said}); `pip install -v` shows the compiler's messages"
                )
            finally:
                self.extensions = everything
            return None

    return BuildExt


def usable_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sentence(name: str, problem: Unbuildable) -> str:
    missing = {"gam_fused._C_cuda": "CUDA kernels", "gam_fused._C_direct": "calls past PyTorch's dispatcher"}
    kernels = missing.get(name, "native kernels")
    advice = "" if isinstance(problem, NotWanted) else " Install gam_fused again when that is mended."
    return f"gam_fused was installed without its {kernels}: {problem}.{advice}"


def fail_if_asked_for(name: str, problem: Unbuildable) -> None:
    if isinstance(problem, NotWanted):
        return
    # That CUDA has no compiler here is no failure of the native build; that its compiler fails is one.
    is_native = name != "gam_fused._C_cuda" or isinstance(problem, NotCompiled)
    is_for_cuda = name != "gam_fused._C_direct"  # which CUDA kernels do without
    variable = "GAM_FUSED_NATIVE" if NATIVE and is_native else "GAM_FUSED_CUDA" if CUDA and is_for_cuda else None
    if variable:
        raise SetupError(f"{variable}=1 asks for {name}, which cannot be built: {problem}")


def tell(name: str, problem: Unbuildable) -> None:
    if not isinstance(problem, NotWanted):
        line = "=" * 100
        text = f"{sentence(name, problem)}\nIt gives the same results without them, more slowly."
        print(f"\n{line}\n{text}\nGAM_FUSED_NATIVE=1 makes this an error.\n{line}\n", file=sys.stderr, flush=True)


# Other commands, and front ends asking for metadata, need no PyTorch and should not wait for it.
BUILDS = {"bdist_wheel", "editable_wheel", "build", "build_ext", "install", "develop"}

if NATIVE is False or not BUILDS & set(sys.argv[1:]):
    setup()
else:
    EXTENSIONS, PROBLEMS = plan()
    setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": command(PROBLEMS)})
