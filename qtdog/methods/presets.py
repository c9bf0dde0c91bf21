"""Presets: what a method is made of, and the protocol numbers of a data set.

Numbers of a run, later ones before earlier ones: the rules' own, the data set's protocol, the method's (for all data
sets, for pictures, for this data set), the draw of `--hparams-seed`, and what the user gives.
"""

import re
from collections.abc import Collection
from dataclasses import MISSING, fields, replace
from typing import Any

from qtdog.config import Quantization, RunConfig, TrainConfig
from qtdog.data import DIGITS
from qtdog.data.modes import color_name, color_of
from qtdog.errors import UserError
from qtdog.methods.checks import check
from qtdog.methods.hparams import random_hparams
from qtdog.methods.method import PARTS, Method, rule_numbers
from qtdog.methods.numbers import dashed

# SWAD averages from the start, and evaluates more often than DomainBed.
_SWAD: dict[str, dict[str, Any]] = {
    "all": {"average_start": 0},
    "pictures": {"checkpoint_freq": 100},
    "VLCS": {"checkpoint_freq": 50, "swad_ratio": 0.2},
    "DomainNet": {"checkpoint_freq": 500},
}
# SAGM's paper and its published commands. DropOut and rates are of its pictures; digits keep their protocol's.
_SAGM: dict[str, dict[str, Any]] = {
    "pictures": {"dropout": 0.5, "lr": 1e-5, "weight_decay": 1e-4, "checkpoint_freq": 100},
    "PACS": {"lr": 3e-5},
    "OfficeHome": {"alpha": 5e-4},
    "DomainNet": {"lr": 3e-5, "alpha": 5e-4, "weight_decay": 1e-6},
}
# GAQAT and its baselines quantize weights and inputs from the start, with one scale a tensor. Those that are built on
# SAGM train, and are evaluated, as SAGM is.
_W4A4 = {"switch_step": 0, "weight_bits": 4, "act_bits": 4, "first_last_bits": 8, "granularity": "tensor"}
_LSQ: dict[str, dict[str, Any]] = {"all": _W4A4}
_LSQ_SAGM = {**_SAGM, "all": _W4A4}
_GAQAT = {**_LSQ_SAGM, "DomainNet": {**_SAGM["DomainNet"], "disorder_window": 2111}}
_FQAT = {**_GAQAT, "all": {**_W4A4, "freeze_granularity": "layer"}}

METHODS: dict[str, Method] = {
    "erm": Method("ERM"),
    "sam": Method("SAM", step="sam"),
    "sagm": Method("SAGM", step="sagm", numbers=_SAGM),
    "coral": Method("CORAL", loss="coral"),
    "mixstyle": Method("MixStyle", loss="mixstyle"),
    "weight-noise": Method("Weight noise", step="weight-noise"),
    "swad": Method("SWAD", averaging="swad", numbers=_SWAD),
    "sma": Method("SMA", averaging="sma", ensemble="EoA"),
    "qtdog": Method("QT-DoG", quantizer="lsq", ensemble="EoQ"),
    "qtdog-inq": Method("QT-DoG (INQ)", quantizer="inq", numbers={"all": {"granularity": "tensor"}}),
    "coral+qtdog": Method("CORAL + QT-DoG", loss="coral", quantizer="lsq"),
    "mixstyle+qtdog": Method("MixStyle + QT-DoG", loss="mixstyle", quantizer="lsq"),
    "qtdog+swad": Method("QT-DoG + SWAD", averaging="swad", quantizer="lsq", numbers=_SWAD),
    "qtdog+sma": Method("QT-DoG + SMA", averaging="sma", quantizer="lsq"),
    "lsq": Method("LSQ", quantizer="lsq", numbers=_LSQ),
    "lsq+sagm": Method("LSQ + SAGM", step="sagm", quantizer="lsq", numbers=_LSQ_SAGM),
    "gaqat": Method("GAQAT", step="gaqat", quantizer="lsq", numbers=_GAQAT),
    "fqat": Method("FQAT", step="gaqat", quantizer="lsq", numbers=_FQAT),
}
ENSEMBLES = {"eoa": ("sma", 6), "eoq": ("qtdog", 5)}  # a method, and how many members the paper trains of it
BACKBONES = {"resnet-50": "resnet50.tv_in1k", "deit-s": "deit_small_patch16_224.fb_in1k"}  # the papers' by short names

# DomainBed counts 5001 updates, so that step 5000 is evaluated. The switch is at 40 % of them and quantization is 7-bit
# with a scale a channel, as in the QT-DoG paper. The scales' own learning rate is this project's choice: Adam moves a
# scale by up to that rate a step, whatever its gradient, and a 7-bit scale is a quarter of the mean weight.
_QUANTIZATION: dict[str, Any] = {
    **{f.name: f.default for f in fields(Quantization) if f.default is not MISSING and f.name != "quantizer"},
    **{"switch_step": 2000, "weight_bits": 7, "granularity": "channel"},
}
_LOOP: dict[str, Any] = {"sampling": "uniform", "accumulate": 1, "schedule": "constant", "warmup_steps": 0}
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
    "augmentation": "none",
    "precision": "float32",
    "scale_lr": 1e-5,
    **_LOOP,
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
    "augmentation": "qtdog",
    "precision": "float32",
    "scale_lr": 5e-6,
    **_LOOP,
    **_QUANTIZATION,
}
_DOMAIN_NET: dict[str, Any] = {**_PHOTOS, "steps": 15001, "checkpoint_freq": 1000, "switch_step": 8000}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "RotatedMNIST": _DIGITS,
    "ColoredMNIST": _DIGITS,
    "PACS": _PHOTOS,
    "VLCS": _PHOTOS,
    "OfficeHome": _PHOTOS,
    "TerraIncognita": _PHOTOS,
    "DomainNet": _DOMAIN_NET,
    "folder": _PHOTOS,
    "csv": _PHOTOS,
}


def method_names() -> list[str]:
    """What `--method` may be."""
    return [*METHODS, *ENSEMBLES]


def refuse_unknown(flag: str, name: str, known: Collection[str]) -> None:
    """Raises UserError for a name that nothing has registered."""
    if name not in known:
        raise UserError(f"--{flag} {name}: there are {', '.join(known)}; plug-ins may have others")


def method_of(name: str) -> str:
    """The method that `--method` names: eoq and eoa are ensembles of one."""
    refuse_unknown("method", name, method_names())
    return ENSEMBLES[name][0] if name in ENSEMBLES else name


_PART = re.compile(rf"\+(?=(?:{'|'.join(PARTS)})=)")  # begins a part in the name of a composition


def composed(config: TrainConfig) -> str:
    """The name of the method that a user asks for: a preset's, with the parts that stand instead of its own."""
    preset = method_of(config.method)
    parts = []
    for part, known in PARTS.items():
        value, own = getattr(config, part), getattr(METHODS[preset], part) or "none"
        if value is not None:
            refuse_unknown(part, value, known)
        if value not in (None, own):
            parts.append(f"{part}={value}")
    return "+".join([preset, *parts])


def preset_name(name: str) -> str:
    """The preset of a run's method, be it a composition or not."""
    return _PART.split(name)[0]


def find_method(name: str) -> Method:
    """The method of a run, a preset or a composition of one's own.

    Raises:
        UserError: for a name that nothing has registered.
    """
    base, *parts = _PART.split(name)
    if base not in METHODS:
        raise UserError(f"there is no method {base}: it is another version's, or a plug-in's (see --plugin)")
    if not parts:
        return METHODS[base]
    changes: dict[str, Any] = dict(part.split("=", 1) for part in parts)
    label = ", ".join([METHODS[base].label, *(f"{part} {value}" for part, value in changes.items())])
    if changes.get("quantizer") == "none":
        changes["quantizer"] = None
    return replace(METHODS[base], label=label, ensemble=None, **changes)


def place_of(name: str) -> tuple[int, str]:
    """Sorts methods as METHODS has them, compositions behind what they are made of."""
    base = preset_name(name)
    return list(METHODS).index(base) if base in METHODS else len(METHODS), name


def seeds_of(config: TrainConfig) -> list[int]:
    """The seeds to train: those given, else one for each member of an ensemble, else 0."""
    members = ENSEMBLES[config.method][1] if config.method in ENSEMBLES else 1
    return config.seeds or list(range(members))


def preset_of(name: str, dataset: str) -> dict[str, Any]:
    """All numbers that the presets have for a method on a data set, by the names of the flags."""
    own = find_method(name).numbers
    pictures = {} if dataset in DIGITS else own.get("pictures", {})
    defaults = {name: number.default for name, (_, number) in rule_numbers().items()}
    return {**defaults, **PROTOCOLS[dataset], **own.get("all", {}), **pictures, **own.get(dataset, {})}


def settle(config: TrainConfig, test_env: int, seed: int) -> RunConfig:
    """The run of `config` that leaves out domain `test_env`, with the presets' numbers where the user gave none.

    Where settings have several values, `config` is one of its `grid.points`.
    """
    refuse_unknown("dataset", config.dataset, PROTOCOLS)
    name = composed(config)
    chosen, preset = find_method(name), preset_of(name, config.dataset)
    if config.hparams_seed > 0:
        drawn = random_hparams(config.dataset, chosen.loss, config.hparams_seed, config.trial_seed)
        preset |= {**drawn, "scale_lr": preset["scale_lr"] * drawn["lr"] / preset["lr"]}  # the ratio to lr stays
    value = {name: preset[name] if (own := given(config, name)) is None else own for name in preset}
    options = chosen.options()
    refuse_meaningless(config, chosen)
    quantization = None
    if chosen.quantizer is not None:
        settings = {f.name: value[f.name] for f in fields(Quantization) if f.name != "quantizer"}
        quantization = Quantization(**settings, quantizer=chosen.quantizer)
        if given(config, "average_start") is None:
            value["average_start"] = quantization.switch_step
    settled: dict[str, Any] = {f.name: value[f.name] for f in fields(RunConfig) if f.name in preset}
    settled |= {kind: {option: value[option] for option in names} for kind, names in options.items()}
    settled["backbone"] = BACKBONES.get(value["backbone"], value["backbone"])
    run = RunConfig(
        dataset=config.dataset,
        data_dir=config.data_dir,
        method=name,
        test_envs=(test_env,),
        trial_seed=config.trial_seed,
        hparams_seed=config.hparams_seed,
        seed=seed,
        holdout_fraction=config.holdout_fraction,
        eval_train_images=config.eval_train_images,
        image_size=config.image_size,
        background=color_name(color_of(config.background)),
        quantization=quantization,
        grid=tuple(config.grid),
        **settled,
    )
    check(run, chosen)
    return run


def given(config: TrainConfig, name: str) -> Any:
    """What a user gave for a setting or a number, of several values the first; None if nothing."""
    if name in config.grid:
        return config.grid[name][0]
    return config.numbers.get(name) if name in rule_numbers() else getattr(config, name)


def meaningless(config: TrainConfig, chosen: Method) -> list[str]:
    """The settings given in `config` that belong to a rule that the method does not follow."""
    if unknown := config.numbers.keys() - rule_numbers().keys():
        raise UserError(f"no rule has the number {', '.join(sorted(unknown))}")
    used = {option for names in chosen.options().values() for option in names}
    if chosen.quantizer is not None:
        used |= {f.name for f in fields(Quantization)}
    rules = [*rule_numbers(), *_QUANTIZATION, "scale_lr"]
    return [option for option in rules if option not in used and given(config, option) is not None]


def refuse_meaningless(config: TrainConfig, chosen: Method) -> None:
    """Raises UserError for a setting of a rule that the method does not follow."""
    for option in meaningless(config, chosen):
        quantizes = option in {f.name for f in fields(Quantization)}
        reason = ", which does not quantize" if quantizes else ": leave it out"
        raise UserError(f"--{dashed(option)} has no meaning for method {config.method}{reason}")


def changed_from_preset(run: RunConfig) -> dict[str, Any]:
    """The settings of a run that differ from those of its method and data set."""
    values = run.settings()
    preset = preset_of(run.method, run.dataset)
    if run.quantization is not None:
        preset["average_start"] = run.quantization.switch_step
    return {name: values[name] for name in preset if name in values and values[name] != preset[name]}
