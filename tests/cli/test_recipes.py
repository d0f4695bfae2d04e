"""From options to a config: defaults, refusals, and what a resumed run may be told."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gam_fused.cli.config import RunConfig, refuse_contradictions
from gam_fused.cli.errors import CommandError
from gam_fused.cli.recipes import check_device, resolve
from gam_fused.gam import DEFAULT_ALPHA, DEFAULT_RHO


def test_defaults_of_gam() -> None:
    config = resolve({})
    assert (config.data, config.model, config.optimizer, config.base) == ("digits", "resnet", "gam", "sgd")
    assert (config.rho, config.alpha) == (DEFAULT_RHO, DEFAULT_ALPHA)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model": "vit"}, {"base": "adamw", "momentum": None, "lr": 0.002, "weight_decay": 0.05}),
        ({"model": "vit", "base": "sgd"}, {"base": "sgd", "momentum": 0.9, "lr": 0.1, "weight_decay": 5e-4}),
        ({"model": "vit", "optimizer": "sgd"}, {"base": "sgd", "momentum": 0.9, "rho": None, "alpha": None}),
        ({"optimizer": "adamw"}, {"base": "adamw", "momentum": None, "rho": None, "rho_warmup": None}),
        ({"optimizer": "sam"}, {"base": "sgd", "rho": 0.05, "alpha": None, "hvp": None, "interval": None}),
        ({"optimizer": "gam"}, {"hvp": "exact", "rho_prime": None, "beta": None, "gamma": None, "form": None}),
        (
            {"optimizer": "accelerated-gam"},
            {"rho": 0.2, "rho_prime": 0.02, "alpha": 0.6, "beta": 0.5, "gamma": 0.03, "form": "paper", "hvp": None},
        ),
        ({"data": "fashion-mnist"}, {"augment": True, "batch_size": 128}),
        ({"data": "digits"}, {"augment": False, "batch_size": 64, "data_dir": None}),
    ],
)
def test_defaults_depend_on_the_choice(given: dict[str, Any], expected: dict[str, Any]) -> None:
    config = asdict(resolve(given))
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "sgd", "rho": 0.1}, "--rho has no effect with --optimizer sgd"),
        ({"optimizer": "sgd", "base": "sgd"}, "--base has no effect with --optimizer sgd"),
        ({"optimizer": "sam", "alpha": 0.1}, "--alpha has no effect with --optimizer sam"),
        ({"optimizer": "adamw", "rho_warmup": 1.0}, "--rho-warmup has no effect with --optimizer adamw"),
        ({"optimizer": "sam", "backend": "foreach"}, "--backend has no effect with --optimizer sam"),
        ({"optimizer": "accelerated-gam", "hvp": "exact"}, "--hvp has no effect with --optimizer accelerated-gam"),
        ({"optimizer": "gam", "rho_prime": 0.1}, "--rho-prime has no effect with --optimizer gam"),
        ({"optimizer": "gam", "form": "paper"}, "--form has no effect with --optimizer gam"),
        ({"base": "adamw", "momentum": 0.5}, "--momentum has no effect with the adamw update rule"),
        ({"data": "digits", "data_dir": "x"}, "--data-dir has no effect with --data digits"),
    ],
)
def test_option_that_would_be_ignored_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        resolve(given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("epochs", "batch_size", "interval", "threads")),
        *((name, -0.1) for name in ("lr", "lr_warmup", "weight_decay", "rho", "rho_warmup", "alpha")),
        *((name, float("nan")) for name in ("lr", "rho", "alpha", "label_smoothing", "momentum")),
        *((name, float("inf")) for name in ("lr", "rho", "alpha")),
        *((name, value) for name in ("momentum", "label_smoothing") for value in (-0.1, 1.0)),
        *((name, -0.1) for name in ("rho_prime", "beta", "gamma")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_value_out_of_range_is_refused(name: str, value: float) -> None:
    with pytest.raises(CommandError, match=rf"^--{name.replace('_', '-')} {value}: must be "):
        resolve({name: value, **({"optimizer": "accelerated-gam"} if name in ("rho_prime", "beta", "gamma") else {})})


@pytest.mark.parametrize("device", ["nonsense", "cuda:77"])
def test_device_that_cannot_be_used_is_refused(device: str) -> None:
    with pytest.raises(CommandError, match=f"--device {device} cannot be used: "):
        check_device(device)


def test_config_survives_its_file(tmp_path: Path) -> None:
    config = resolve({"lr": 1 / 3, "train_size": 100})
    config.save(tmp_path / "config.json")
    assert RunConfig.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": "digits"}', "\xff"])
def test_foreign_config_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CommandError, match="is not the config of a training run"):
        RunConfig.load(path)


def test_every_contradiction_is_refused_and_named() -> None:
    """Whatever field differs, except where the data lie."""
    config = resolve({})
    for name, value in json.loads(json.dumps(asdict(config))).items():
        refuse_contradictions(config, {name: value})
        other = "x" if value is None or isinstance(value, str) else value + 1
        if name == "data_dir":
            refuse_contradictions(config, {name: other})
        else:
            with pytest.raises(CommandError, match=rf"--{name.replace('_', '-')} .* contradicts the run to resume"):
                refuse_contradictions(config, {name: other})
