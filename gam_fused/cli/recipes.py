"""Default settings, and the way from the options given to a complete, validated config."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from gam_fused import accelerated
from gam_fused.cli.config import RunConfig, option
from gam_fused.cli.errors import CommandError
from gam_fused.gam import DEFAULT_ALPHA, DEFAULT_RHO

PLAIN: dict[str, Any] = {
    "data": "digits",
    "data_dir": None,
    "train_size": None,
    "model": "resnet",
    "label_smoothing": 0.0,
    "optimizer": "gam",
    "momentum": 0.9,
    "rho_prime": accelerated.DEFAULT_RHO_PRIME,
    "beta": accelerated.DEFAULT_BETA,
    "gamma": accelerated.DEFAULT_GAMMA,
    "form": "paper",
    "hvp": "exact",
    "backend": "auto",
    "interval": 1,
    "epochs": 10,
    "seed": 0,
}
"""Defaults that depend on nothing. The others depend on the data set, the model, the update rule or the optimizer."""

BATCH_SIZE = {"digits": 64, "fashion-mnist": 128}
AUGMENT = {"digits": False, "fashion-mnist": True}
BASE = {"mlp": "sgd", "cnn": "sgd", "resnet": "sgd", "vit": "adamw"}
LR = {"sgd": 0.1, "adamw": 0.002}
LR_WARMUP = {"sgd": 0.0, "adamw": 1.0}
WEIGHT_DECAY = {"sgd": 5e-4, "adamw": 0.05}
RHO = {"sam": 0.05, "gam": DEFAULT_RHO, "accelerated-gam": accelerated.DEFAULT_RHO}
ALPHA = {"gam": DEFAULT_ALPHA, "accelerated-gam": accelerated.DEFAULT_ALPHA}
RHO_WARMUP = {"sgd": 0.0, "adamw": 1.0}


def _alternatives(defaults: Mapping[str, Any]) -> str:
    """``{"mlp": 1, "cnn": 1, "vit": 2}`` as "1 (mlp, cnn), 2 (vit)"."""
    values = dict.fromkeys(defaults.values())
    cases = {value: ", ".join(key for key in defaults if defaults[key] == value) for value in values}
    return ", ".join(f"{value} ({keys})" for value, keys in cases.items())


IN_WORDS: dict[str, str] = {
    **{name: str(value) for name, value in PLAIN.items()},
    "data_dir": "where Debian's dataset-fashion-mnist puts it",
    "train_size": "all",
    "batch_size": _alternatives(BATCH_SIZE),
    "augment": _alternatives({data: "on" if augment else "off" for data, augment in AUGMENT.items()}),
    "base": _alternatives(BASE),
    "lr": _alternatives(LR),
    "lr_warmup": _alternatives(LR_WARMUP),
    "weight_decay": _alternatives(WEIGHT_DECAY),
    "rho": _alternatives(RHO),
    "alpha": _alternatives(ALPHA),
    "rho_warmup": _alternatives(RHO_WARMUP),
    "threads": "as many as PyTorch takes",
    "device": "cuda if available, else cpu",
}
"""Every default as ``--help`` shows it."""


def resolve(given: Mapping[str, Any]) -> RunConfig:
    """The config of a new run from the options ``given``, by field name, with defaults for all others.

    Raises :class:`CommandError` for a value out of range, and for an option that the chosen optimizer or data set
    would ignore: a knob that turns nothing should not be there to turn.
    """
    chosen = {**PLAIN, **given}
    data, model, optimizer = chosen["data"], chosen["model"], chosen["optimizer"]
    base = optimizer if optimizer in LR else chosen.get("base", BASE[model])
    defaults = {
        **PLAIN,
        "batch_size": BATCH_SIZE[data],
        "augment": AUGMENT[data],
        "lr": LR[base],
        "lr_warmup": LR_WARMUP[base],
        "weight_decay": WEIGHT_DECAY[base],
        "rho": RHO.get(optimizer),
        "alpha": ALPHA.get(optimizer),
        "rho_warmup": RHO_WARMUP[base],
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    without_use = _without_use(data, optimizer, base)
    for name in given:
        if name in without_use:
            raise CommandError(f"{option(name)} has no effect with {without_use[name]}; leave it out")
    config = RunConfig(**{**defaults, **given, **dict.fromkeys(without_use), "base": base})
    _check_ranges(config)
    return config


def _without_use(data: str, optimizer: str, base: str) -> dict[str, str]:
    """Settings that do not reach the numbers, each with the choice that is to blame."""
    without_use = {}
    if data != "fashion-mnist":
        without_use.update(dict.fromkeys(["data_dir"], f"--data {data}"))
    if base != "sgd":
        without_use.update(dict.fromkeys(["momentum"], f"the {base} update rule"))
    if optimizer not in RHO:
        without_use.update(dict.fromkeys(["base", "rho", "rho_warmup"], f"--optimizer {optimizer}"))
    if optimizer not in ALPHA:
        without_use.update(dict.fromkeys(["alpha", "backend", "interval"], f"--optimizer {optimizer}"))
    if optimizer != "gam":
        without_use.update(dict.fromkeys(["hvp"], f"--optimizer {optimizer}"))
    if optimizer != "accelerated-gam":
        without_use.update(dict.fromkeys(["rho_prime", "beta", "gamma", "form"], f"--optimizer {optimizer}"))
    return without_use


def _check_ranges(config: RunConfig) -> None:
    for name in ("epochs", "batch_size", "interval", "threads"):
        _check(config, name, 1, math.inf, "1 or more")
    for name in ("lr", "lr_warmup", "weight_decay", "rho", "rho_warmup", "rho_prime", "alpha", "beta", "gamma"):
        _check(config, name, 0, math.inf, "0 or more")
    for name in ("momentum", "label_smoothing"):
        _check(config, name, 0, 1, "at least 0 and below 1")
    _check(config, "seed", 0, 2**32, "at least 0 and below 2^32")


def _check(config: RunConfig, name: str, lowest: float, limit: float, words: str) -> None:
    value = getattr(config, name)
    if value is not None and not lowest <= value < limit:
        raise CommandError(f"{option(name)} {value}: must be {words}")


def check_device(name: str) -> None:
    """Raise :class:`CommandError` if this machine has no device of that name."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: this PyTorch was built without the device
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used: {reason}") from error
