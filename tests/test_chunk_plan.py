"""How many launches a step of GAM takes on CUDA, as csrc/chunk_plan.h plans them."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks import shapes

ROOT = Path(__file__).parents[1]
PROGRAM = """
#include <iostream>
#include "chunk_plan.h"
int main() {
    int64_t lists = 0, count = 0;
    std::cin >> lists >> count;
    std::vector<int64_t> numels(count);
    for (int64_t& numel : numels) std::cin >> numel;
    for (const gam_fused::Launch& launch : gam_fused::plan_launches(numels, lists)) {
        std::cout << launch.begin << " " << launch.end << std::endl;
    }
}
"""

Plan = Callable[[Sequence[int], int], list[tuple[int, int]]]

# Lists of tensors with an address in the table of each launch, as in csrc/cuda: both norms of a pair are in one list.
SGD_STEP = {"norm of g": 1, "norm of u": 1, "perturb": 2, "norms of g_adv and h": 1, "sgd_step": 5}


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path_factory.mktemp("plan") / "plan"
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", "-x", "c++", "-", "-o"]
    subprocess.run([*command, str(program)], input=PROGRAM, text=True, check=True)

    def launches(numels: Sequence[int], lists: int) -> list[tuple[int, int]]:
        numbers = " ".join(map(str, [lists, len(numels), *numels]))
        done = subprocess.run([str(program)], input=numbers, text=True, check=True, capture_output=True)
        return [(int(begin), int(end)) for begin, end in (line.split() for line in done.stdout.splitlines())]

    return launches


@pytest.mark.parametrize("model", [shapes.resnet18, shapes.resnet50, shapes.vit_b, shapes.gpt2])
def test_a_step_takes_five_launches(plan: Plan, model: Callable[[], list[tuple[int, ...]]]) -> None:
    numels = [math.prod(shape) for shape in model()]
    tensors = {launch: numels * 2 if "norms" in launch else numels for launch in SGD_STEP}
    assert sum(len(plan(tensors[launch], lists)) for launch, lists in SGD_STEP.items()) == 5


@pytest.mark.parametrize("lists", [1, 2, 5, 8])
def test_launches_cover_every_tensor_with_elements_once_and_in_order(plan: Plan, lists: int) -> None:
    numels = [i % 5 for i in range(3000)]
    covered = [i for begin, end in plan(numels, lists) for i in range(begin, end) if numels[i]]
    assert covered == [i for i, numel in enumerate(numels) if numel]
    assert len(plan(numels, lists)) > 1


@pytest.mark.parametrize("lists", [1, 8])
def test_tensors_without_elements_have_places_in_the_table(plan: Plan, lists: int) -> None:
    """So that the place of a tensor in the list follows from its place in the table."""
    full = plan([1] * 4000, lists)[0][1]
    for begin, end in plan([i % 2 for i in range(4000)], lists):
        assert 0 < end - begin <= full


def test_no_elements_take_no_launch(plan: Plan) -> None:
    assert plan([0, 0], 1) == []
    assert plan([], 1) == []
