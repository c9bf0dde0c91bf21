"""Presets: what a method is made of, and the protocol numbers of a data set.

Settings that a user gives override the protocol; `settle` fills in the rest.
"""

from dataclasses import dataclass
from typing import Any

from qtdog.config import Quantization, RunConfig, TrainConfig
from qtdog.errors import UserError


@dataclass(frozen=True)
class Method:
    """One loss (qtdog.algorithms), one step rule (qtdog.steps), quantized or not."""

    label: str
    ensemble_label: str
    algorithm: str
    step: str
    quantized: bool


METHODS: dict[str, Method] = {
    "erm": Method("ERM", "Ensemble of ERM", algorithm="erm", step="plain", quantized=False),
    "qtdog": Method("QT-DoG", "EoQ", algorithm="erm", step="plain", quantized=True),
}

# DomainBed counts 5001 updates, so that step 5000 is evaluated. The switch is at 40 % of them and quantization is 7-bit
# with a scale a channel, as in the QT-DoG paper. The scales' own learning rate is this project's choice: Adam moves a
# scale by up to that rate a step, whatever its gradient, and a 7-bit scale is a quarter of the mean weight.
_QUANTIZATION = {"switch_step": 2000, "weight_bits": 7, "granularity": "channel"}
_DIGITS: dict[str, Any] = {
    "steps": 5001,
    "checkpoint_freq": 100,
    "batch_size": 64,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "backbone": "MNIST_CNN",
    "weights": "none",
    "dropout": 0.0,
    "freeze_bn": False,
    "scale_lr": 1e-5,
    **_QUANTIZATION,
}
_PHOTOS: dict[str, Any] = {
    "steps": 5001,
    "checkpoint_freq": 300,
    "batch_size": 32,
    "lr": 5e-5,
    "weight_decay": 0.0,
    "backbone": "resnet50.tv_in1k",
    "weights": "timm",
    "dropout": 0.0,
    "freeze_bn": True,
    "scale_lr": 5e-6,
    **_QUANTIZATION,
}
PROTOCOLS = {"RotatedMNIST": _DIGITS, "ColoredMNIST": _DIGITS, "folder": _PHOTOS}


def settle(config: TrainConfig, test_env: int, seed: int) -> RunConfig:
    """The run of `config` that leaves out domain `test_env`, with the presets' numbers where the user gave none."""
    protocol = PROTOCOLS[config.dataset]
    method = METHODS[config.method]
    value = {name: given if (given := getattr(config, name)) is not None else protocol[name] for name in protocol}
    quantization = {name: value.pop(name) for name in ("switch_step", "weight_bits", "granularity", "scale_lr")}
    if not method.quantized:
        for name in quantization:
            if getattr(config, name) is not None:
                raise UserError(f"--{dashed(name)} has no meaning for method {config.method}, which does not quantize")
    run = RunConfig(
        dataset=config.dataset,
        data_dir=config.data_dir,
        method=config.method,
        test_env=test_env,
        trial_seed=config.trial_seed,
        seed=seed,
        holdout_fraction=config.holdout_fraction,
        eval_train_images=config.eval_train_images,
        image_size=config.image_size,
        quantization=Quantization(**quantization) if method.quantized else None,
        **value,
    )
    check(run)
    return run


def changed_from_preset(run: RunConfig) -> dict[str, Any]:
    """The settings of a run that differ from its data set's protocol."""
    values = run.to_dict()
    values.update(values.pop("quantization") or {})
    protocol = PROTOCOLS[run.dataset]
    return {name: values[name] for name in protocol if name in values and values[name] != protocol[name]}


def check(run: RunConfig) -> None:
    """Raises UserError for numbers that cannot be trained with, before anything is read or trained."""
    for name in ("steps", "checkpoint_freq", "batch_size", "lr"):
        if not getattr(run, name) > 0:
            raise UserError(f"--{dashed(name)} must be greater than 0, not {getattr(run, name)}")
    for name in ("weight_decay", "trial_seed", "seed", "dropout"):
        if not getattr(run, name) >= 0:
            raise UserError(f"--{dashed(name)} must not be negative, not {getattr(run, name)}")
    if not 0 < run.holdout_fraction < 1:
        raise UserError(f"--holdout-fraction must lie between 0 and 1, not {run.holdout_fraction}")
    if run.eval_train_images is not None and run.eval_train_images < 1:
        raise UserError(f"--eval-train-images must be at least 1, not {run.eval_train_images}")
    is_digits = run.dataset != "folder"
    if is_digits != (run.backbone == "MNIST_CNN"):
        fitting = "MNIST_CNN" if is_digits else "a timm model of RGB images, such as resnet50.tv_in1k"
        raise UserError(f"--backbone {run.backbone} does not take {run.dataset} images: use {fitting}")
    if is_digits:
        for name, none in (("weights", "none"), ("dropout", 0.0), ("freeze_bn", False), ("image_size", None)):
            if getattr(run, name) != none:
                raise UserError(f"--{dashed(name)} has no meaning for MNIST_CNN: leave it out")
    if run.quantization is None:
        return
    if not 2 <= run.quantization.weight_bits <= 8:
        raise UserError(f"--weight-bits must be 2 to 8, not {run.quantization.weight_bits}")
    if run.quantization.scale_lr < 0:
        raise UserError(f"--scale-lr must not be negative, not {run.quantization.scale_lr}")
    if not 0 <= run.quantization.switch_step < run.steps:
        raise UserError(
            f"quantization would start at step {run.quantization.switch_step}, which a run of {run.steps} steps never "
            f"reaches: give --switch-step (the paper's 40 % is {run.steps * 2 // 5}) or more --steps"
        )


def dashed(name: str) -> str:
    """A field's name as its flag is spelled."""
    return name.replace("_", "-")
