"""Everything random in a training run: seeding, capturing, restoring."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def make_deterministic(seed: int, threads: int) -> None:
    """Seed every generator and make PyTorch give the same bits each time, on this machine and with these threads."""
    # cuBLAS reads this once, when it starts; without it, its results depend on which stream got which workspace.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # That switch also fills every new tensor with NaN, to catch reads of uninitialised memory: a debugging aid.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if torch.backends.cudnn.benchmark:  # off by default, and not to be set where global flags are frozen
        torch.backends.cudnn.benchmark = False
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def epoch_order(size: int, seed: int, epoch: int, device: torch.device) -> Tensor:
    """The order of the training images in ``epoch``, a function of its arguments alone.

    So a run that stops in the middle of an epoch need not remember the order, only how far it got.
    """
    return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(size)).to(device)


def capture() -> dict[str, Any]:
    """The state of every generator, in types that ``torch.load(weights_only=True)`` accepts."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": numpy,
    }


def restore(state: dict[str, Any]) -> None:
    """Put every generator back to what :func:`capture` returned."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
