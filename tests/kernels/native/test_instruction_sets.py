"""Every instruction set gives the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.native.common import needs_native

pytestmark = needs_native

SETS = {"baseline": (), "avx2": ("avx2", "f16c"), "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq")}

DIGESTS = """
import hashlib, itertools, torch
torch.set_num_threads(1)
from gam_fused.kernels import extension
ops = torch.ops.gam_fused
assert extension.unavailable_reason() is None
BOTH = (False, True)
RULES = {
    "sgd_step_": [
        dict(momentum=m, dampening=0.0 if n else 0.2, weight_decay=w, nesterov=n, first_step=f, maximize=x)
        for m, n, w, f, x in itertools.product((0.0, 0.9), BOTH, (0.0, 0.1), BOTH, BOTH)
        if m or not (n or f)
    ],
    "adamw_step_": [
        dict(weight_decay=w, decoupled_weight_decay=d, amsgrad=a, maximize=x)
        for w, d, a, x in itertools.product((0.0, 0.1), BOTH, BOTH, BOTH)
    ],
}
def digest(tensors):
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]
def lists(dtype, count, sizes, kind):
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        tensors = []
        for size in sizes:
            t = torch.randn(size, generator=g)
            if kind == "tiny":  # float16 subnormals before and after rounding, and zeros
                t = t * 2.0 ** torch.randint(-30, -8, (size,), generator=g).float()
            elif kind == "wide":
                t = t * 2.0 ** torch.randint(-14, 14, (size,), generator=g).float()
            tensors.append(t.to(dtype))
        out.append(tensors)
    return out
def any_bits(dtype, sizes):
    g = torch.Generator().manual_seed(1)
    raw = [torch.randint(0, 256, (size, dtype.itemsize), generator=g, dtype=torch.uint8) for size in sizes]
    return [t.view(dtype).squeeze(-1) for t in raw]
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    n = lambda v: torch.tensor(v, dtype=wide)
    for kind in ("normal", "tiny", "wide"):
        sizes = [1, 3, 7, 8, 9, 15, 31, 33, 1023, 1025, 20_003, 0]
        def show(what, tensors):
            print(dtype, kind, what, digest(tensors))
        for scale in (0.3, 1e-3):
            a, b = lists(dtype, 2, sizes, kind)
            alone = [ops.l2_norm([t]) for t in (*a, *b)]  # before a long list's other sums hide the last bits
            show("l2_norm", [*alone, ops.l2_norm(a), *ops.l2_norm_pair(a, b)])
            c, d = lists(dtype, 2, sizes, kind)
            ops.perturb_(a, b, n(1.7), n(2.5), scale, 0.01)
            ops.perturb_(c, d, n(1.7), n(2.5), scale, 0.01, rounding_seed=7)
            show("perturb_", [*a, *b])
            show("perturb_ with a seed", [*c, *d])
            a, b, c, d = lists(dtype, 4, sizes, kind)
            show("difference_norm", [*(ops.difference_norm([i], [j]) for i, j in zip(a, b)), ops.difference_norm(a, b)])
            for rest in ((b, c, d), ([], c, []), (b, c, [])):
                ops.shift_(a, *rest, n(1.7), scale, 0.01, rounding_seed=None if rest[2] else 7)
                show("shift_", a)
            a, b, c, d = lists(dtype, 4, sizes, kind)
            ops.combine_(a, b, c, d, n(1.7), 1.0, scale, 0.01)
            show("combine_", [*a, *c])
            a, b, c, d = lists(dtype, 4, sizes, kind)
            alone = [ops.projection([i], [j], [k], [l], 0.3, 0.7, -0.2, scale) for i, j, k, l in zip(a, b, c, d)]
            sums = ops.projection(a, b, c, d, 0.3, 0.7, -0.2, scale)
            show("projection", [*itertools.chain(*alone), *sums])
            ops.decompose_(a, b, c, d, n(-1.3), n(2.5), 0.3, 0.7, -0.2, scale, 0.01)
            show("decompose_", [*a, *b])
        for rule in RULES["sgd_step_"]:
            for scaled in ({}, {"grad_scale": torch.tensor(3.0), "write_grads": False}, {"rounding_seed": -1}):
                p, b, g, h, m = lists(dtype, 5, sizes, kind)
                rest = (m if rule["momentum"] else [], n(1.7), [n(1.0)], 0.3, 0.7, 0.01)
                ops.sgd_step_(p, b, g, h, *rest, lr=0.05, **rule, **scaled)
                show(f"sgd_step_ {rule} {list(scaled)}", [*p, *g, *m])
        for rule, seed in itertools.product(RULES["adamw_step_"], (None, 7)):
            p, b, g, h, m, v, x = lists(dtype, 7, sizes, kind)
            v, x = [t.abs() for t in v], [t.abs() for t in x]
            steps = [torch.tensor(4.0) for _ in sizes]
            rest = (x if rule["amsgrad"] else [], steps, n(1.7), [], 0.3, 0.7, 0.01)
            ops.adamw_step_(p, b, g, h, m, v, *rest, lr=0.05, **rule, rounding_seed=seed)
            show(f"adamw_step_ {rule} {seed}", [*p, *g, *m, *v, *x, *steps])
    sizes = [5, 17 * 2**20 // dtype.itemsize, 1001]  # the second is written past the caches
    nans = any_bits(dtype, sizes)
    params = [torch.zeros_like(t) for t in nans]
    ops.restore_(params, nans)
    print(dtype, "restore_", digest(params))
    ops.perturb_(nans, [torch.zeros_like(t) for t in nans], n(float("nan")), n(1.0), 0.1, 0.0)
    print(dtype, "perturb_ in place", digest(nans))
"""


def digests(capability: str | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "GAM_FUSED_CPU_CAPABILITY"}
    if capability is not None:
        environment["GAM_FUSED_CPU_CAPABILITY"] = capability
    return subprocess.run(
        [sys.executable, "-c", DIGESTS],
        cwd=Path(__file__).parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def baseline_digests() -> list[str]:
    done = digests("baseline")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 500
    return lines


@pytest.mark.parametrize("capability", [None, "avx2", "avx512"], ids=str)
def test_every_instruction_set_gives_the_same_bits(capability: str | None, baseline_digests: list[str]) -> None:
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(encoding="utf-8", errors="replace").split() if cpu.exists() else []
    missing = [flag for flag in SETS.get(capability or "", ()) if flag not in flags]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    done = digests(capability)
    assert done.returncode == 0, done.stderr
    pairs = zip(done.stdout.splitlines(), baseline_digests, strict=True)
    assert [line for line, other in pairs if line != other] == []


def test_an_unknown_instruction_set_raises_a_clear_error() -> None:
    done = digests("sse9")
    assert done.returncode != 0
    assert "GAM_FUSED_CPU_CAPABILITY must be one of avx512, avx2, baseline, got sse9" in done.stderr
