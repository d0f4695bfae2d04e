"""How long the double backward of each layer takes, in PyTorch's composition and in fused kernels.

    python -m benchmarks.bench_second_order
    python -m benchmarks.bench_second_order --threads 2 --layers batch_norm,layer_norm --json second_order.json
    python -m benchmarks.bench_second_order --device cuda --dtype fp32,bf16

A layer is run forward and differentiated with ``create_graph=True``; what is timed is the second call of
``torch.autograd.grad``: from the first gradients of input, weight and bias to the incoming gradient, input and weight.
PyTorch's composition and the fused kernels, native on a CPU and Triton's on CUDA, are measured in turns within one run.

GB/s are the bytes that have to be read and written at least, the layer's input, the incoming gradient and the incoming
double gradient and two results of the same size, over the median time of the fused kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.tables import aligned, number
from benchmarks.timing import Timing, measure, timer_for
from gam_fused.second_order.batch_norm import batch_norm
from gam_fused.second_order.group_norm import group_norm, instance_norm
from gam_fused.second_order.layer_norm import layer_norm
from gam_fused.second_order.normalization import kernels_for
from gam_fused.second_order.rms_norm import rms_norm

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
IMAGES = (64, 64, 32, 32)
TOKENS = (16, 512, 768)


@dataclass(frozen=True)
class Layer:
    """PyTorch's function and ours, of the same arguments: input, weight and bias."""

    shape: tuple[int, ...]
    parameters: tuple[int, ...]
    theirs: Callable[[Tensor, Tensor, Tensor], Tensor]
    ours: Callable[[Tensor, Tensor, Tensor], Tensor]
    memory_format: torch.memory_format = torch.contiguous_format


def _of_batch_norm(memory_format: torch.memory_format) -> Layer:
    return Layer(
        IMAGES,
        IMAGES[1:2],
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True),
        lambda x, w, b: batch_norm(x, None, None, w, b, True),
        memory_format,
    )


def _of_group_norm(groups: int, memory_format: torch.memory_format = torch.contiguous_format) -> Layer:
    return Layer(
        IMAGES,
        IMAGES[1:2],
        lambda x, w, b: F.group_norm(x, groups, w, b),
        lambda x, w, b: group_norm(x, groups, w, b),
        memory_format,
    )


LAYERS = {
    "batch_norm": _of_batch_norm(torch.contiguous_format),
    "batch_norm channels_last": _of_batch_norm(torch.channels_last),
    "group_norm of 8": _of_group_norm(8),
    "group_norm of 32": _of_group_norm(32),
    "group_norm channels_last": _of_group_norm(8, torch.channels_last),
    "instance_norm": Layer(
        IMAGES,
        IMAGES[1:2],
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b),
        lambda x, w, b: instance_norm(x, weight=w, bias=b),
    ),
    "layer_norm": Layer(
        TOKENS,
        TOKENS[-1:],
        lambda x, w, b: F.layer_norm(x, TOKENS[-1:], w, b),
        lambda x, w, b: layer_norm(x, list(TOKENS[-1:]), w, b),
    ),
    "rms_norm": Layer(
        TOKENS,
        TOKENS[-1:],
        lambda x, w, b: F.rms_norm(x, TOKENS[-1:], w),
        lambda x, w, b: rms_norm(x, list(TOKENS[-1:]), w),
    ),
}


@dataclass(frozen=True)
class Row:
    """Medians of one layer in one dtype."""

    layer: str
    shape: tuple[int, ...]
    dtype: str
    pytorch_ms: float
    fused_ms: float
    times_as_fast: float
    gb_per_s: float  # of three tensors read and two written, each once


def double_backward(
    layer: Layer,
    forward: Callable[[Tensor, Tensor, Tensor], Tensor],
    dtype: str,
    device: torch.device = CPU,
) -> Callable[[], None]:
    """A call that does nothing but the double backward."""
    generator = torch.Generator().manual_seed(0)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, DTYPES[dtype])

    def activations() -> Tensor:
        return numbers(layer.shape).contiguous(memory_format=layer.memory_format)

    x = activations().requires_grad_()
    parameters = [numbers(layer.parameters).requires_grad_() for _ in range(2)]
    grad_output = activations().requires_grad_()  # as it is behind a layer with a second derivative
    grads = torch.autograd.grad(
        forward(x, *parameters), [x, *parameters], grad_output, create_graph=True, allow_unused=True
    )
    used = [grad for grad in grads if grad is not None]  # RMS normalization has no bias
    vectors = [activations(), *(numbers(grad.shape) for grad in used[1:])]
    inputs = [grad_output, x, parameters[0]]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(used, inputs, vectors, retain_graph=True)

    return call


def bench(names: Sequence[str], dtypes: Sequence[str], device: torch.device, repeats: int) -> Iterator[Row]:
    """Measure layers in dtypes, one after the other, PyTorch and ours in turns."""
    timer = timer_for(device)
    for name in names:
        layer = LAYERS[name]
        for dtype in dtypes:
            calls = {
                "pytorch": double_backward(layer, layer.theirs, dtype, device),
                "fused": double_backward(layer, layer.ours, dtype, device),
            }
            timings = measure(calls, timer, repeats)
            theirs, ours = timings["pytorch"], timings["fused"]
            if isinstance(theirs, Timing) and isinstance(ours, Timing):
                counted = 5 * torch.Size(layer.shape).numel() * DTYPES[dtype].itemsize
                milliseconds = theirs.median * 1e3, ours.median * 1e3
                yield Row(
                    name,
                    layer.shape,
                    dtype,
                    *milliseconds,
                    milliseconds[0] / milliseconds[1],
                    counted / ours.median / 1e9,
                )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Aligned lines."""
    columns = "layer", "shape", "dtype", "PyTorch ms", "fused ms", "times as fast", "GB/s"
    cells = [
        (
            row.layer,
            "x".join(map(str, row.shape)),
            row.dtype,
            *map(number, (row.pytorch_ms, row.fused_ms, row.times_as_fast, row.gb_per_s)),
        )
        for row in rows
    ]
    yield from aligned([columns, *cells], [None] * (len(cells) + 1), names=3)


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names."""
    known = list(known)

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return text.split(",")

    return parse


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prog = "python -m benchmarks.bench_second_order"
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=CPU, help="cpu or cuda (default: cpu)")
    parser.add_argument("--layers", type=_names(LAYERS), default=list(LAYERS), help=f"out of {','.join(LAYERS)}")
    parser.add_argument("--dtype", type=_names(DTYPES), default=["fp32"], help="out of fp32,bf16,fp64 (default: fp32)")
    parser.add_argument("--threads", type=int, help="of the CPU (default: PyTorch's)")
    parser.add_argument("--repeats", type=int, default=15, help="timings of each (default: 15)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch sees no CUDA device here")
    if options.threads:
        torch.set_num_threads(options.threads)
    kernels = kernels_for(options.device).__name__.rpartition(".")[2]
    header = {
        "machine": machine.description(options.device, "benchmarks.bench_second_order", arguments),
        "settings": {"repeats": options.repeats, "fused": kernels},
    }
    print(machine.as_lines(header["machine"]), end="\n\n")
    print(f"fused: {kernels}", end="\n\n")
    rows = list(bench(options.layers, options.dtype, options.device, options.repeats))
    print("\n".join(table(rows)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**header, "rows": list(map(asdict, rows))}, indent=2) + "\n")


if __name__ == "__main__":
    main()
