"""Small runs, and what it means that two of them are equal to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gam_fused.cli.recipes import resolve
from gam_fused.cli.run_folder import RunFolder
from gam_fused.cli.trainer import Trainer
from gam_fused.cli.training import build_trainer

TIMES = ("seconds", "step_seconds")

SMALL: dict[str, Any] = {
    "model": "mlp",  # has dropout
    "augment": True,
    "train_size": 160,
    "batch_size": 20,
    "epochs": 3,
    "threads": 1,
    "device": "cpu",
}
"""Eight steps per epoch, with randomness of both kinds in each step."""


def arguments(options: dict[str, Any]) -> list[str]:
    """Options by field name as the command line spells them."""
    result = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            result.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            result += [f"--{flag}", str(value)]
    return result


def trained(epochs: int = 1, **options: Any) -> Trainer:
    """A small run of ``epochs``, without a folder."""
    trainer = build_trainer(resolve({**SMALL, "epochs": epochs, **options}))
    while not trainer.finished:
        trainer.train_epoch(lambda report: None, lambda: False)
        trainer.end_epoch()
    return trainer


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters()])


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run left behind, without times: the whole last checkpoint and the CSV."""
    run = RunFolder(folder)
    state = torch.load(run.checkpoint, weights_only=True)["state"]
    del state["progress"]["seconds"]
    for record in state["history"]:
        for name in TIMES:
            del record[name]
    header, *rows = (line.split(",") for line in run.log.read_text().splitlines())
    kept = [column for column, name in enumerate(header) if name not in TIMES]
    state["csv"] = [[row[column] for column in kept] for row in rows]
    return state


def assert_bitwise_equal(left: Any, right: Any, where: str = "outcome") -> None:
    """Compare nested dictionaries, lists and tensors; ``where`` names the place in the error."""
    assert type(left) is type(right), where
    if isinstance(left, dict):
        assert list(left) == list(right), where
        for key in left:
            assert_bitwise_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_bitwise_equal(one, other, f"{where}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert left.shape == right.shape, where
        assert left.contiguous().view(-1).numpy().tobytes() == right.contiguous().view(-1).numpy().tobytes(), where
    else:
        assert left == right, where
