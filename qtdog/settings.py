"""Files of settings (`--config`): what a person writes as what the flags take, and what is wrong with it."""

import difflib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from qtdog import plugins
from qtdog.arguments import values_of
from qtdog.config import RunConfig
from qtdog.data import domain_names
from qtdog.errors import UserError
from qtdog.methods.method import PARTS
from qtdog.methods.presets import METHODS, find_method, preset_name

ALIASES = {"seed": "seeds"}  # as the flags have them
NO_VALUE = ("none", "null", "")
WANTED = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "none"}
MANY = {int: "integers", float: "numbers", bool: "true or false", str: "names"}


def with_settings(arguments: Sequence[str], command: str, hints: Mapping[str, Any]) -> list[str]:
    """The arguments with what is in the files of settings instead of their names, checked as in `read_settings`."""
    read, left = [], list(arguments)
    data_dirs = values_of("--data-dir", arguments)
    while left:
        flag, equals, file = left.pop(0).partition("=")
        if flag == "--config" and (equals or left):
            settings = read_settings(
                file if equals else left.pop(0), command, hints, data_dirs[-1] if data_dirs else None
            )
            read.append(f"--config={yaml.safe_dump(settings, default_flow_style=True, width=float('inf'))}")
        else:
            read.append(flag + equals + file)
    return read


def read_settings(file: str, command: str, hints: Mapping[str, Any], data_dir: str | None = None) -> dict[str, Any]:
    """The settings of `qtdog <command>` in a YAML file, by the names of their fields.

    Args:
        hints: the type of each setting.
        data_dir: the one given on the command line, where the record of a run may name another.

    Raises:
        UserError: for a file that holds no settings, and naming all that are unknown or of another type.
    """
    typed, raw = parse(file)
    if "quantization" in typed:
        if command != "train":
            raise UserError(f"--config {file} is the record of one run: `qtdog train --config {file}` trains it again")
        return {name: value for name, value in settings_of_run(file, typed, data_dir).items() if name in hints}
    settings: dict[str, Any] = {}
    wrong = []
    for written, value in typed.items():
        name = str(written).replace("-", "_")
        name = ALIASES.get(name, name)
        if name in ("config", "plugin") and not value:
            continue  # as --print_config writes them
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=3)
            wrong.append(f"there is no setting {written}" + f" (near names: {', '.join(near)})" * bool(near))
            continue
        if name in settings:
            wrong.append(f"{name} is there twice")
        try:
            settings[name] = fitted(value, raw.get(written, value), hints[name])
        except ValueError:
            wrong.append(f"{name} is {shown(value)}, {wanted(hints[name])} is wanted")
    if wrong:
        raise UserError(f"--config {file} does not fit qtdog {command}: {'; '.join(wrong)}")
    return settings


def parse(file: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What a YAML file holds, and the same with every value as it is written."""
    if not Path(file).is_file():
        raise UserError(f"--config {file} is not a file")
    content = Path(file).read_bytes()
    try:
        typed, raw = yaml.safe_load(content), yaml.load(content, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {file} is not YAML in UTF-8: {error}") from error
    if not isinstance(typed, dict):
        raise UserError(f"--config {file} holds no settings: write `name: value` in each line")
    if typed.get("config"):
        raise UserError(f"--config {file} names another file of settings: give both files")
    if typed.get("plugin"):  # a file of settings from elsewhere shall not run code
        raise UserError(f"--config {file}: plug-ins are named on the command line, by --plugin, not in a file")
    return typed, dict(zip(typed, raw.values(), strict=True)) if len(typed) == len(raw) else {}


def fitted(value: Any, raw: Any, hint: Any) -> Any:
    """A value as the type that is wanted: also one of a list alone, and names that YAML takes for numbers.

    Raises:
        ValueError: if it is none.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return first_fitting(value, raw, inner)
    if origin in (list, tuple):
        if value is None or (origin is tuple and not isinstance(value, list)):
            raise ValueError
        values, texts = (value, raw) if isinstance(value, list) else ([value], [raw])
        return [fitted(each, text, inner[0]) for each, text in zip(values, texts, strict=True)]
    if origin is Literal:
        hint = str
        if raw not in inner:
            raise ValueError
    if hint is str and value is not None and isinstance(raw, str):
        return raw
    if hint is float and isinstance(value, str):  # 1e-3, which YAML takes for a word
        return float(value)
    if hint is type(None) and (value is None or str(value).lower() in NO_VALUE):
        return None
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint not in (int, bool) or type(value) is not hint:
        raise ValueError
    return value


def first_fitting(value: Any, raw: Any, hints: tuple[Any, ...]) -> Any:
    """A value as the first of these types that it fits; as none where it is one and may be."""
    if value is None and type(None) in hints:
        return None
    for hint in hints:
        try:
            return fitted(value, raw, hint)
        except ValueError:
            continue
    raise ValueError


def wanted(hint: Any) -> str:
    """What a setting may be, for people."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(wanted(each) for each in inner)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (list, tuple):
        return f"a list of {MANY.get(inner[0], 'values')}"
    return WANTED.get(hint, "another")


def shown(value: Any) -> str:
    """A value for a message, short."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def settings_of_run(file: str, record: Mapping[str, Any], data_dir: str | None) -> dict[str, Any]:
    """What `qtdog train` must be told to train the run again whose config.yaml this is."""
    try:
        run = RunConfig.from_dict(dict(record))
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"--config {file} is a run's record that this version cannot read: {error}") from error
    plugins.require(run.plugins, file, unchanged=False)
    settings = run.settings()
    data_dir = data_dir or run.data_dir
    _, domains = domain_names(run.dataset, data_dir)
    if missing := [env for env in (*run.test_envs, *run.sources) if not 0 <= env < len(domains)]:
        raise UserError(f"--config {file} has a domain {missing[0]} of {run.dataset}, which has {len(domains)}")
    # By name: as an index it could be the name of another domain.
    targets, sources = [domains[env] for env in run.test_envs], [domains[env] for env in run.sources]
    settings |= {"test_envs": ["+".join(targets)], "sources": sources, "seeds": [run.seed]}
    preset, chosen = METHODS[preset_name(run.method)], find_method(run.method)
    own = {part: getattr(chosen, part) or "none" for part in PARTS}
    parts = {part: value for part, value in own.items() if value != (getattr(preset, part) or "none")}
    return {**settings, **dict.fromkeys(PARTS), **parts, "method": preset_name(run.method)}
