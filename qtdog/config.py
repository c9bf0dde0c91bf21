"""Settings of training. A YAML file (`--config`) and command-line flags fill the same dataclasses, one a subcommand.

`TrainConfig` is what a user says: it may name many runs and leaves to the presets what it does not say. The settings
of other subcommands stand beside the functions that these call.
`RunConfig` is one run with every number settled; it is stored beside the run's results.
"""

from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import qkernels as qk
from qtdog.plain_types import checked

AugmentationName = Literal["domainbed", "swad", "qtdog", "none"]
QatMode = Literal["qat", "frozen-backbone", "rtn-frozen"]
INQ_FRACTIONS = (0.5, 0.75, 0.875, 1.0)  # of a layer's weights, frozen at equal distances from the switch on
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["float32", "bfloat16", "float16"]
Granularity = Literal["channel", "tensor"]
Sampling = Literal["uniform", "balanced"]
Schedule = Literal["constant", "cosine"]


@dataclass
class TrainConfig:
    """Settings of `qtdog train`; None means: as the presets say."""

    dataset: Annotated[
        str,
        "which data; `folder` is any <root>/<domain>/<class>/<image> under --data-dir, `csv` a list of images",
    ] = "RotatedMNIST"
    data_dir: Annotated[
        str | None,
        "root of the data, or the data set's own folder; for `folder` that of the domain folders, for `csv` the file, "
        "for the MNIST sets the one that holds MNIST/raw/*ubyte; never downloaded to",
    ] = None
    method: Annotated[str, "preset of loss, step rule, quantization and averaging"] = "qtdog"
    loss: Annotated[str | None, "instead of the preset's", "parts of the method"] = None
    step: Annotated[str | None, "instead of the preset's step rule", "parts of the method"] = None
    averaging: Annotated[str | None, "instead of the preset's", "parts of the method"] = None
    quantizer: Annotated[str | None, "instead of the preset's; `none` trains in float", "parts of the method"] = None
    test_envs: Annotated[
        list[str],
        "target domains, each left out in its own runs: indices, names or `all`; `photo+sketch` leaves out two at once",
    ] = field(default_factory=lambda: ["all"])
    sources: Annotated[
        list[str],
        "domains to train on (default: all but the targets); `all` other domains are then left out at once",
    ] = field(default_factory=list)
    trial_seed: Annotated[
        int, "splits every domain into its in and out parts; one table cell is a mean over trials"
    ] = 0
    hparams_seed: Annotated[
        int, "0: the presets' lr, batch size, weight decay and dropout; else a random draw of them, as in DomainBed"
    ] = 0
    seeds: Annotated[
        list[int],
        "one run a seed: initialization, minibatches, augmentation, dropout (default: 0; eoq 0 to 4, eoa 0 to 5)",
    ] = field(default_factory=list)
    output_dir: Annotated[str, "runs go to <output-dir>/<dataset>/<method>/<target>/trial<t>_seed<s>/"] = "runs"

    steps: Annotated[int | None, "number of updates"] = None
    checkpoint_freq: Annotated[int | None, "steps between evaluations, each of which also saves a checkpoint"] = None
    batch_size: Annotated[int | None, "images of each source domain in a minibatch"] = None
    sampling: Annotated[
        Sampling | None,
        "how a domain's part of a minibatch is drawn, with replacement: `uniform`, every image equally likely (as in "
        "DomainBed), or `balanced`, every class that occurs equally likely",
    ] = None
    accumulate: Annotated[
        int | None, "pieces in which a minibatch is computed, one after the other, for want of memory"
    ] = None
    lr: Annotated[float | None, "learning rate of Adam for weights, norm layers and head"] = None
    weight_decay: Annotated[float | None, "weight decay of Adam (scales are never decayed)"] = None
    schedule: Annotated[
        Schedule | None, "of all learning rates: `constant`, or `cosine`, which falls to nearly 0 until the last step"
    ] = None
    warmup_steps: Annotated[int | None, "steps in which all learning rates grow to their whole, in proportion"] = None
    holdout_fraction: Annotated[float, "share of every domain in its out part, the validation images"] = 0.2
    eval_train_images: Annotated[
        int | None, "source training images evaluated per domain at a checkpoint (None: all); less is faster"
    ] = None

    switch_step: Annotated[
        int | None, "quantization starts before the update of this step (counted from 0)", "quantization"
    ] = None
    weight_bits: Annotated[int | None, "bits of a quantized weight, 2 to 8", "quantization"] = None
    act_bits: Annotated[
        int | None, "bits of the input of each quantized layer, 2 to 8 (None: float)", "quantization"
    ] = None
    first_last_bits: Annotated[
        int | None, "bits of the first and the last layer (None: first as the others, last float)", "quantization"
    ] = None
    granularity: Annotated[
        Granularity | None, "one scale an output channel, or one a weight tensor", "quantization"
    ] = None
    scale_lr: Annotated[float | None, "learning rate of Adam for the quantization scales", "quantization"] = None
    qat_mode: Annotated[
        QatMode | None,
        "`qat` trains through the quantizers; for comparison, from the switch on `rtn-frozen` rounds once and trains "
        "norm layers and head alone (what QT-DoG's released code does), `frozen-backbone` the same without rounding",
        "quantization",
    ] = None

    backbone: Annotated[
        str | None,
        "MNIST_CNN (DomainBed's) or SMALL_CNN, of a fortieth of its work (the MNIST sets); any timm model (pictures), "
        "`resnet-50` and `deit-s` are the papers'",
    ] = None
    weights: Annotated[
        str | None, "`timm` (its pretrained weights), `none`, a .safetensors file, or the folder of a finished run"
    ] = None
    image_size: Annotated[int | None, "side in pixels of the network's input (default: the backbone's own)"] = None
    background: Annotated[str, "color that transparent pixels of pictures show, such as black or #808080"] = "white"
    dropout: Annotated[float | None, "dropout before the head of a timm model"] = None
    freeze_bn: Annotated[bool | None, "keep BatchNorm statistics as pretrained; scale and bias are trained"] = None
    augmentation: Annotated[
        AugmentationName | None,
        "`domainbed`, `swad` and `qtdog` crop, flip, jitter and gray training images alike; `domainbed` does so to the "
        "source images it validates on, too",
    ] = None

    precision: Annotated[
        Precision | None,
        "of matrix products and convolutions in training (torch.autocast; weights, updates and evaluation are float32)",
    ] = None

    device: Annotated[Device, "where to train; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[
        int | None, "processes that read images, at most the CPU cores (results do not depend on it)"
    ] = None
    jobs: Annotated[int, "runs trained at once, each in its own process with its share of the CPU cores"] = 1
    resume: Annotated[bool, "continue unfinished runs from their last checkpoint"] = False
    overwrite: Annotated[bool, "start again where a run is already, finished or not"] = False

    numbers: dict[str, Any] = field(default_factory=dict)  # of the method's rules, each a flag of its own
    grid: dict[str, list[Any]] = field(default_factory=dict)  # settings and numbers with several values, a run for each


@dataclass(frozen=True)
class Plugin:
    """A file that a run needs, see `qtdog.plugins`: where it was, and what was in it."""

    path: str
    sha256: str

    def __str__(self) -> str:
        return f"{Path(self.path).name} {self.sha256[:8]}"


@dataclass(frozen=True)
class Quantization:
    """When and how a run quantizes."""

    switch_step: int
    scale_lr: float
    weight_bits: int
    granularity: Granularity
    act_bits: int | None = None
    first_last_bits: int | None = None
    quantizer: Literal["lsq", "inq"] = "lsq"
    qat_mode: QatMode = "qat"

    @property
    def makes_codes(self) -> bool:
        """Whether the model that comes out is quantized: not of `frozen-backbone`, which stays float."""
        return self.qat_mode != "frozen-backbone"

    def qconfig(self) -> qk.QConfig:
        """QT-DoG's policy, every convolution and linear layer but the classifier, unless `first_last_bits` is given."""
        return qk.QConfig(
            weight_bits=self.weight_bits,
            act_bits=self.act_bits,
            quantizer=self.quantizer,
            granularity=self.granularity,
            learn_scale=self.qat_mode == "qat",
            first_layer=self.first_last_bits or "same",
            last_layer=self.first_last_bits or "float",
        )

    def snaps(self, steps: int) -> dict[int, float]:
        """INQ's schedule in a run of `steps`: before the update of which step, what share of the weights is frozen."""
        if self.quantizer != "inq":
            return {}
        span, count = steps - self.switch_step, len(INQ_FRACTIONS)
        return {self.switch_step + i * span // count: fraction for i, fraction in enumerate(INQ_FRACTIONS)}

    def complete_from(self, steps: int) -> int:
        """The first step after whose update all weights are quantized."""
        return max([self.switch_step, *self.snaps(steps)])


@dataclass(frozen=True)
class RunConfig:
    """One run. Two runs with equal fields on the same machine give the same results, bit for bit."""

    dataset: str
    data_dir: str | None
    method: str
    test_envs: tuple[int, ...]  # indices of the target domains
    trial_seed: int
    hparams_seed: int
    seed: int
    steps: int
    checkpoint_freq: int
    batch_size: int
    lr: float
    weight_decay: float
    holdout_fraction: float
    eval_train_images: int | None
    backbone: str
    weights: str
    image_size: int | None
    dropout: float
    freeze_bn: bool
    augmentation: AugmentationName
    quantization: Quantization | None
    loss: dict[str, Any]  # the numbers of the method's loss, by the names of the flags
    step: dict[str, Any]  # of its step rule
    averaging: dict[str, Any]  # of its averaging rule
    precision: Precision = "float32"
    plugins: tuple[Plugin, ...] = ()
    sources: tuple[int, ...] = ()  # indices of the source domains, if they are not all but the targets
    sampling: Sampling = "uniform"
    accumulate: int = 1
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    grid: tuple[str, ...] = ()  # the settings that were given several values, by the names of the flags
    background: str = "white"

    def source_envs(self, domains: int) -> list[int]:
        """Indices of the source domains, of so many."""
        return list(self.sources) or [env for env in range(domains) if env not in self.test_envs]

    def checkpoints_from(self, step: int) -> int:
        """How many checkpoints it has from that of `step` on: after each `checkpoint_freq`-th update and the last."""
        last = self.steps - 1
        regular = last // self.checkpoint_freq - (step - 1) // self.checkpoint_freq
        return regular + (last % self.checkpoint_freq != 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML and JSON. What is in `LATER` and as it is there is left out."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    def settings(self) -> dict[str, Any]:
        """All values by the names of their flags, without the groups they belong to; no plug-ins or grid if none."""
        values = {name: value for name, value in LATER.items() if value != []} | self.to_dict()
        if self.plugins:
            values["plugins"] = ", ".join(str(plugin) for plugin in self.plugins)
        for group in ("quantization", "loss", "step", "averaging"):
            values.update(values.pop(group) or {})
        return values

    def point(self) -> dict[str, Any]:
        """Its values of the settings that were given several."""
        values = self.settings()
        return {name: values[name] for name in self.grid}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Inverse of `to_dict`; TypeError or KeyError for what that cannot have made."""
        values = with_targets(values)
        quantization, plugins = values["quantization"], values.get("plugins", [])
        lists = {"test_envs": values["test_envs"], "sources": values.get("sources", []), "grid": values.get("grid", [])}
        own = {
            "quantization": checked(Quantization, quantization) if quantization else None,
            "plugins": tuple(checked(Plugin, plugin) for plugin in plugins),
            **{name: tuple(value) if isinstance(value, list) else value for name, value in lists.items()},
        }
        return checked(cls, {**values, **own})


def with_targets(values: dict[str, Any]) -> dict[str, Any]:
    """A run's settings as earlier versions stored them, which knew one target a run, as they are stored now."""
    if "test_env" not in values:
        return values
    return {**{name: value for name, value in values.items() if name != "test_env"}, "test_envs": [values["test_env"]]}


# Settings that runs of earlier versions do not know, and what they had. Where a run has that, it is not stored, so that
# such runs resume, and sweeps find them by the hash of their settings.
LATER: dict[str, Any] = {
    f.name: list(f.default) if isinstance(f.default, tuple) else f.default
    for f in fields(RunConfig)
    if f.default is not MISSING and f.name != "precision"  # which has always been stored
}
