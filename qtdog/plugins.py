"""Plug-ins: a file of a user's that registers losses, step rules, averaging rules, methods, data sets and backbones.

`qtdog COMMAND --plugin FILE.py` runs the file before anything else, and so does every process that trains for the
command. Packages name theirs in the entry-point group `qtdog.plugins`, a module each, which every command imports.

A run remembers, by path and hash, the plug-ins that it has something of. Nothing that is stored is ever run: whoever
reads such a run names the file again. Its results may then be read with another version of the file, its model may not.
"""

import hashlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import timm
from torch import nn

from qtdog.config import Plugin, RunConfig, TrainConfig
from qtdog.data import DIGITS, DomainSet, TensorDomain
from qtdog.errors import UserError
from qtdog.methods.algorithms import LOSSES, Loss
from qtdog.methods.averaging import AVERAGING, AveragingRule, FromStart
from qtdog.methods.method import PARTS, Method, rule_numbers
from qtdog.methods.numbers import number, numbers_of
from qtdog.methods.presets import METHODS, PROTOCOLS, find_method, preset_name
from qtdog.methods.steps import STEPS, StepRule
from qtdog.models import DIGIT_NETWORKS

__all__ = [
    "AveragingRule",
    "DomainSet",
    "FromStart",
    "Loss",
    "Method",
    "StepRule",
    "TensorDomain",
    "number",
    "register_averaging",
    "register_backbone",
    "register_dataset",
    "register_loss",
    "register_method",
    "register_step",
]

GROUP = "qtdog.plugins"
T = TypeVar("T")

_loaded: dict[str, Plugin] = {}  # what this process has run, by hash
_modules: dict[str, Plugin] = {}  # the same by the name of the module
_owners: dict[tuple[str, str], Plugin] = {}  # by (kind, name) of what it has registered
_REGISTRIES: tuple[dict[Any, Any], ...] = (
    *(LOSSES, STEPS, AVERAGING, METHODS, DIGITS, DIGIT_NETWORKS, PROTOCOLS),
    *(_loaded, _modules, _owners),
)
_running: Plugin | None = None  # the one that registers now


def register_loss(name: str) -> Callable[[type[T]], type[T]]:
    """A decorator of a `Loss`, a dataclass whose numbers become flags of `qtdog train`."""
    return lambda rule: _enter_rule(LOSSES, "loss", Loss, name, rule)


def register_step(name: str) -> Callable[[type[T]], type[T]]:
    """A decorator of a `StepRule`: how one step is taken."""
    return lambda rule: _enter_rule(STEPS, "step", StepRule, name, rule)


def register_averaging(name: str) -> Callable[[type[T]], type[T]]:
    """A decorator of an `AveragingRule`: what becomes of the weights that training passes through."""
    return lambda rule: _enter_rule(AVERAGING, "averaging", AveragingRule, name, rule)


def register_method(name: str, method: Method) -> None:
    """A preset for `--method`: one loss, step rule, averaging rule and quantizer, and the numbers that differ."""
    for part, known in PARTS.items():
        value = getattr(method, part) or "none"
        if value not in known:
            raise UserError(f"method {name!r} of a plug-in has {part}={value!r}: there are {', '.join(known)}")
    known_numbers = {*rule_numbers(), *PROTOCOLS["RotatedMNIST"]}
    for group, numbers in method.numbers.items():
        if group not in ("all", "pictures", *PROTOCOLS):
            raise UserError(f"method {name!r} of a plug-in has numbers for {group!r}, which is no data set")
        if unknown := numbers.keys() - known_numbers:
            raise UserError(f"method {name!r} of a plug-in has no number {', '.join(sorted(unknown))}")
    labels = {label for other in METHODS.values() for label in (other.label, other.ensemble_label)}
    for label in (method.label, method.ensemble_label):
        if label in labels:
            raise UserError(f"method {name!r} of a plug-in is called {label!r} in tables, as another is")
    _enter(METHODS, "method", name, method)


def register_dataset(name: str, **protocol: Any) -> Callable[[Callable[[str | None], DomainSet]], Any]:
    """A decorator of a function from `--data-dir` to a DomainSet, whose images are tensors that come as they are.

    Pictures need none of this: `--dataset folder` and `--dataset csv` take any.

    Args:
        protocol: settings that differ from those of the MNIST sets, such as steps=1000 or backbone="tiny".
    """
    if unknown := protocol.keys() - PROTOCOLS["RotatedMNIST"].keys():
        raise UserError(f"data set {name!r} of a plug-in: a protocol has no {', '.join(sorted(unknown))}")

    def enter(load: Callable[[str | None], DomainSet]) -> Callable[[str | None], DomainSet]:
        _enter(DIGITS, "dataset", name, load)
        PROTOCOLS[name] = PROTOCOLS["RotatedMNIST"] | protocol
        return load

    return enter


def register_backbone(name: str) -> Callable[[Callable[[int, int], nn.Module]], Any]:
    """A decorator of a function from (channels, classes) to a network, images [N, C, H, W] to logits [N, classes].

    It is for the data sets whose images come as they are. Pictures take any model of timm, and so one that a plug-in
    registers with `timm.models.register_model`.
    """
    return lambda build: _enter(DIGIT_NETWORKS, "backbone", name, build)


def _enter_rule(registry: MutableMapping[str, Any], kind: str, base: type, name: str, rule: Any) -> Any:
    is_one = isinstance(rule, type) and issubclass(rule, base)
    if not is_one:
        raise UserError(f"{kind} {name!r} of a plug-in does not derive from {base.__name__}")
    if "__dataclass_fields__" not in vars(rule):  # is_dataclass sees those of the class it derives from
        raise UserError(f"{kind} {name!r} of a plug-in is no dataclass: put @dataclass right above the class")
    numbers, settings = rule_numbers(), {field.name for field in fields(TrainConfig)}
    for own in numbers_of(rule).values():
        if own.name in settings or (own.name in numbers and numbers[own.name][1] != own):
            raise UserError(f"{kind} {name!r} of a plug-in has the number {own.name!r}, which means something else")
    return _enter(registry, kind, name, rule)


def _enter(registry: MutableMapping[str, Any], kind: str, name: str, what: Any) -> Any:
    if name in registry:
        raise UserError(f"{kind} {name!r} of a plug-in is there already: give it another name")
    if not name or set(name) & set("=,/ "):
        raise UserError(f"{kind} {name!r} of a plug-in: a name is of letters, digits, '-', '_', '.' and '+'")
    registry[name] = what
    if _running is not None:
        _owners[kind, name] = _running
    return what


def load(paths: Iterable[str]) -> None:
    """Run the files that have not been run in this process; UserError for one that is missing or fails."""
    for path in paths:
        source = _source(Path(path))
        plugin = _plugin(Path(path), source)
        if plugin.sha256 in _loaded:
            continue
        module = ModuleType(f"qtdog_plugin_{plugin.sha256[:12]}")
        module.__file__ = plugin.path
        sys.modules[module.__name__] = module  # where dataclasses look their types up
        with _registering(plugin, module.__name__, f"--plugin {path}"):
            exec(compile(source, plugin.path, "exec"), vars(module))  # what was hashed, not a cached file of another


def load_installed() -> None:
    """Import what installed packages name as plug-ins."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        spec = importlib.util.find_spec(entry.module)
        if spec is None or spec.origin is None:
            raise UserError(f"a package names {entry.module} as a plug-in of qtdog, which is not there")
        plugin = described(Path(spec.origin))
        if plugin.sha256 not in _loaded:
            with _registering(plugin, entry.module, f"the installed plug-in {entry.module}"):
                importlib.import_module(entry.module)


@contextmanager
def _registering(plugin: Plugin, module: str, named: str) -> Iterator[None]:
    """What is registered within is the plug-in's; nothing of it stays if it fails."""
    global _running
    before = [dict(registry) for registry in _REGISTRIES]
    _loaded[plugin.sha256] = _modules[module] = _running = plugin
    try:
        yield
    except (Exception, SystemExit) as error:
        for registry, entries in zip(_REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{named}{_line_of(error, plugin.path)}: {reason}") from error
    finally:
        _running = None


def _line_of(error: BaseException, file: str) -> str:
    """Where in a file it comes from, as `, line 3`."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f", line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", line {lines[-1]}" if lines else ""


def described(path: Path) -> Plugin:
    """A plug-in as runs remember it."""
    return _plugin(path, _source(path))


def _plugin(path: Path, source: bytes) -> Plugin:
    return Plugin(str(path.resolve()), hashlib.sha256(source).hexdigest())


def _source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"--plugin {path}: {error.strerror}") from error


def remembered(run: RunConfig) -> RunConfig:
    """The run with the plug-ins that it has something of."""
    method = find_method(run.method)
    names = {
        "method": preset_name(run.method),
        "loss": method.loss,
        "step": method.step,
        "averaging": method.averaging,
        "dataset": run.dataset,
        "backbone": run.backbone,
    }
    owners = {_owners.get(name) for name in names.items()}
    if timm.is_model(run.backbone):
        owners.add(_modules.get(timm.model_entrypoint(run.backbone).__module__))
    in_order = _loaded.values()  # in which another process has to load them
    return replace(run, plugins=tuple(plugin for plugin in in_order if plugin in owners))


def require(plugins: Iterable[Plugin], whose: str, unchanged: bool) -> None:
    """UserError, which names it, for a plug-in of a run that this process has not loaded.

    Args:
        unchanged: whether it must be just as it was; else a file of the same name is good enough.
    """
    names = {Path(plugin.path).name for plugin in _loaded.values()}
    lacking = [plugin for plugin in plugins if plugin.sha256 not in _loaded]
    changed = [plugin for plugin in lacking if Path(plugin.path).name in names]
    if missing := [plugin for plugin in lacking if plugin not in changed]:
        given = " ".join(f"--plugin {plugin.path}" for plugin in missing)
        raise UserError(f"{whose} was trained with a plug-in that is not here: give {given}, or where it lies now")
    if changed and unchanged:
        files = ", ".join(plugin.path for plugin in changed)
        raise UserError(f"{whose} was trained with the plug-in {files}, which has changed since: give it as it was")
