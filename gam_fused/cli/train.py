"""``gam-fused train``: the command's options. What they do is in :mod:`gam_fused.cli.training`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gam_fused import keep_freed_memory
from gam_fused.cli import training
from gam_fused.cli.recipes import IN_WORDS, PLAIN
from gam_fused.cli.run_folder import RunFolder, default_folder

_DATA, _OPTIMIZER, _RUN = "Data and model", "Optimizer", "Run"


def _option(name: str, help: str, panel: str) -> Any:
    """An option that is ``None`` unless given, so that defaults can depend on other options and runs can be resumed."""
    return typer.Option(help=f"{help} Default: {IN_WORDS[name]}.", show_default=False, rich_help_panel=panel)


def train(
    context: typer.Context,
    data: Annotated[Literal["digits", "fashion-mnist"] | None, _option("data", "Data set.", _DATA)] = None,
    data_dir: Annotated[
        Path | None, _option("data_dir", "Folder with the four IDX files of Fashion-MNIST.", _DATA)
    ] = None,
    train_size: Annotated[
        int | None, _option("train_size", "Train on this many images, in balanced classes.", _DATA)
    ] = None,
    augment: Annotated[
        bool | None, _option("augment", "Shift (and, for clothes, flip) training images at random.", _DATA)
    ] = None,
    model: Annotated[
        Literal["mlp", "cnn", "resnet", "vit"] | None, _option("model", "Network to train.", _DATA)
    ] = None,
    label_smoothing: Annotated[
        float | None, _option("label_smoothing", "Probability spread over all classes, in [0, 1).", _DATA)
    ] = None,
    optimizer: Annotated[
        Literal["sgd", "adamw", "sam", "gam", "accelerated-gam"] | None,
        _option("optimizer", "Training algorithm.", _OPTIMIZER),
    ] = None,
    base: Annotated[
        Literal["sgd", "adamw"] | None, _option("base", "Update rule under sam and both kinds of gam.", _OPTIMIZER)
    ] = None,
    lr: Annotated[
        float | None, _option("lr", "Peak learning rate; decays to 0 as a cosine over the run.", _OPTIMIZER)
    ] = None,
    lr_warmup: Annotated[
        float | None, _option("lr_warmup", "Epochs of linear learning-rate warm-up.", _OPTIMIZER)
    ] = None,
    momentum: Annotated[float | None, _option("momentum", "Momentum of the sgd rule.", _OPTIMIZER)] = None,
    weight_decay: Annotated[
        float | None, _option("weight_decay", "Weight decay; not applied to biases and norms.", _OPTIMIZER)
    ] = None,
    rho: Annotated[
        float | None, _option("rho", "Radius of the neighbourhood, for all but sgd and adamw.", _OPTIMIZER)
    ] = None,
    rho_warmup: Annotated[float | None, _option("rho_warmup", "Epochs of linear rho warm-up.", _OPTIMIZER)] = None,
    rho_prime: Annotated[
        float | None, _option("rho_prime", "Length of accelerated-gam's steps ahead.", _OPTIMIZER)
    ] = None,
    alpha: Annotated[
        float | None,
        _option("alpha", "Weight of gam's flatness penalty; of the first gradient ahead.", _OPTIMIZER),
    ] = None,
    beta: Annotated[
        float | None, _option("beta", "Weight of the gradient in accelerated-gam's h⁻.", _OPTIMIZER)
    ] = None,
    gamma: Annotated[
        float | None, _option("gamma", "Weight of accelerated-gam's perpendicular part.", _OPTIMIZER)
    ] = None,
    form: Annotated[
        Literal["paper", "released_code"] | None, _option("form", "What accelerated-gam's h⁻ is.", _OPTIMIZER)
    ] = None,
    hvp: Annotated[
        Literal["exact", "finite_difference"] | None,
        _option("hvp", "How gam computes Hessian-vector products.", _OPTIMIZER),
    ] = None,
    backend: Annotated[
        str | None, _option("backend", "gam's kernels; `gam-fused info` lists them.", _OPTIMIZER)
    ] = None,
    interval: Annotated[
        int | None, _option("interval", "Steps from one use of gam's flatness term to the next.", _OPTIMIZER)
    ] = None,
    epochs: Annotated[int | None, _option("epochs", "Passes over the training images.", _RUN)] = None,
    batch_size: Annotated[int | None, _option("batch_size", "Images per step.", _RUN)] = None,
    seed: Annotated[int | None, _option("seed", "Seed of weights, order, dropout and augmentation.", _RUN)] = None,
    threads: Annotated[
        int | None, _option("threads", "CPU threads; part of what makes a run repeatable.", _RUN)
    ] = None,
    device: Annotated[str | None, _option("device", "cpu, cuda, cuda:1, …", _RUN)] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for all that the run writes; new or empty. Default: runs/DATA-MODEL-OPTIMIZER-SEED.",
            show_default=False,
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out, bit for bit, with its saved settings. Default: off.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", help="Print the final table only. Default: off.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Train a small image classifier and report loss, accuracy and first-order flatness.

    Writes config.json, metrics.csv, curves.png, TensorBoard events and checkpoint.pt into the folder --out;
    the checkpoint after every epoch and on Ctrl-C. Defaults may depend on other options, in parentheses.
    """
    given = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name in IN_WORDS and value is not None
    }
    folder = RunFolder(out) if out else default_folder({**PLAIN, **given})
    keep_freed_memory()
    trainer = training.resumed_run(given, folder) if resume else training.new_run(given, folder)
    training.run(trainer, folder, quiet)
