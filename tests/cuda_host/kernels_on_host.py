"""Building the CUDA kernels for the CPU and calling them with tensors."""

from __future__ import annotations

import fcntl
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = ("perturb", "shift", "combine", "decompose", "sgd", "adamw", "l2_norm")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/dtype.h
COMPILER = "g++"
FLAGS = ("-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
ADDRESS = "-fsanitize=address,undefined"
THREAD = "-fsanitize=thread"
# A data race or a barrier that not all threads reach may leave threads waiting for ever.
TIMEOUT = 120


class KernelsFailed(AssertionError):
    """The kernels did not run to their end; the message is what the process wrote."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process at a time gets past here."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(folder: Path, sanitizer: str, csrc: Path = CSRC, sources: Sequence[str] = SOURCES) -> KernelsOnHost:
    """Compile the harness with some of the kernels, or take what another process has built in the same folder."""
    folder.mkdir(exist_ok=True)
    program = folder / "harness"
    with locked(folder / "lock"):
        if not program.exists():
            objects = []
            for source in (HERE / "harness.cpp", *(csrc / "cuda" / f"{name}.cu" for name in sources)):
                objects.append(str(folder / f"{source.stem}.o"))
                # A build of some sources has the operators of these only.
                operators = [f"-DWITH_{name.upper()}" for name in sources]
                include = (*operators, f"-I{csrc}", "-include", str(HERE / "cuda_on_host.h"), "-x", "c++")
                _compile(*FLAGS, sanitizer, "-fno-sanitize-recover=all", *include, "-c", str(source), "-o", objects[-1])
            unfinished = folder / "unfinished"
            _compile(sanitizer, *objects, "-pthread", "-o", str(unfinished))
            unfinished.rename(program)
    return KernelsOnHost(program)


def mutated(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of csrc in which one piece of one file is replaced."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    path = csrc / file
    text = path.read_text()
    assert old in text, f"{file} no longer contains {old!r}: adapt this test to what it says now"
    path.write_text(text.replace(old, new, 1))
    return csrc


def _compile(*arguments: str) -> None:
    done = subprocess.run([COMPILER, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class KernelsOnHost:
    """The launch functions of csrc/cuda/launches.h, one process for each call.

    Tensors of the lists are flat; they are written in place, as on a device. `offsets` says by how many elements each
    tensor lies off a 16-byte boundary: one number for each list and tensor, or none for aligned tensors.
    """

    program: Path
    seed: int = 0  # of the order of blocks
    multiprocessors: int = 1

    def call(
        self,
        operator: str,
        lists: Sequence[Sequence[Tensor]],
        *,
        numbers: Sequence[float],
        scalars: Sequence[Tensor | None] = (),
        offsets: Sequence[Sequence[int]] | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """Run an operator on lists of equally many tensors; scalars and numbers in the order of harness.cpp."""
        dtype = lists[0][0].dtype if lists[0] else torch.float32
        numels = [tensor.numel() for tensor in lists[0]]
        if offsets is None:
            offsets = [[0] * len(numels)] * len(lists)
        buffers: list[tuple[int, Tensor | None]] = []
        for tensors, list_offsets in zip(lists, offsets, strict=True):
            assert len(tensors) == len(numels)
            for tensor, offset in zip(tensors, list_offsets, strict=True):
                buffers.append((offset * tensor.element_size(), tensor))
        buffers += [(0, scalar) for scalar in scalars]

        case = [_counted(operator.encode()), struct.pack("=Iii", self.seed, self.multiprocessors, DTYPES.index(dtype))]
        case.append(struct.pack("=?Q", rounding_seed is not None, rounding_seed or 0))
        case.append(struct.pack(f"=Q{len(numbers)}d", len(numbers), *numbers))
        case.append(struct.pack(f"=Q{len(numels)}q", len(numels), *numels))
        case.append(struct.pack("=Q", len(buffers)))
        for offset, tensor in buffers:
            case += [struct.pack("=Q", offset), _counted(b"" if tensor is None else _bytes_of(tensor).tobytes())]
        result = self._run(b"".join(case))
        assert len(result) == sum(tensor.nbytes for _, tensor in buffers if tensor is not None)
        read = 0
        for _, tensor in buffers:
            if tensor is not None and tensor.nbytes:
                _bytes_of(tensor)[:] = np.frombuffer(result, np.uint8, tensor.nbytes, read)
                read += tensor.nbytes

    def _run(self, case: bytes) -> bytes:
        with tempfile.TemporaryDirectory(dir=self.program.parent) as folder:
            case_path, result_path = Path(folder, "case"), Path(folder, "result")
            case_path.write_bytes(case)
            try:
                done = subprocess.run(
                    [self.program, case_path, result_path],
                    capture_output=True,
                    text=True,
                    timeout=TIMEOUT,
                    env={"TSAN_OPTIONS": "halt_on_error=1"},
                )
            except subprocess.TimeoutExpired as late:
                raise KernelsFailed(f"did not finish in {TIMEOUT} s: threads wait for each other") from late
            if done.returncode != 0:
                raise KernelsFailed(done.stderr)
            return result_path.read_bytes()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _counted(data: bytes) -> bytes:
    return struct.pack("=Q", len(data)) + data
