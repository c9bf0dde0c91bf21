"""Settings that are refused before anything is read or trained.

Those that cannot be trained with, and those by which a run would silently follow another method than its name says: a
penalty between domains where there is one, an average that never begins, a decision that never falls. A number that
makes one rule another, such as a radius of 0, is its user's choice: the log says what it comes to (`same_as`).
"""

from pathlib import Path
from typing import Literal, get_args, get_origin

from qtdog.config import INQ_FRACTIONS, Quantization, RunConfig
from qtdog.data import DIGITS
from qtdog.errors import UserError
from qtdog.methods.algorithms import LOSSES
from qtdog.methods.averaging import AVERAGING, FromStart
from qtdog.methods.method import Method
from qtdog.methods.numbers import dashed, numbers_of
from qtdog.methods.steps import STEPS
from qtdog.models import DIGIT_NETWORKS

_NOT_FOR_DIGITS = {"weights": "none", "dropout": 0.0, "freeze_bn": False, "image_size": None, "augmentation": "none"}
_NOT_FOR_DIGITS["background"] = "white"


def check(run: RunConfig, method: Method) -> None:
    """Raises UserError for numbers that cannot be trained with, or not by this method."""
    for name in ("steps", "checkpoint_freq", "batch_size", "lr"):
        if not getattr(run, name) > 0:
            raise UserError(f"--{dashed(name)} must be greater than 0, not {getattr(run, name)}")
    for name in ("weight_decay", "trial_seed", "hparams_seed", "seed", "dropout"):
        if not getattr(run, name) >= 0:
            raise UserError(f"--{dashed(name)} must not be negative, not {getattr(run, name)}")
    if run.dropout >= 1:
        raise UserError(f"--dropout must be less than 1, which would drop everything, not {run.dropout}")
    if not 0 < run.holdout_fraction < 1:
        raise UserError(f"--holdout-fraction must lie between 0 and 1, not {run.holdout_fraction}")
    if run.eval_train_images is not None and run.eval_train_images < 1:
        raise UserError(f"--eval-train-images must be at least 1, not {run.eval_train_images}")
    check_backbone(run)
    check_numbers(run, method)
    check_pieces(run, method)
    if not 0 <= run.warmup_steps < run.steps:
        raise UserError(
            f"--warmup-steps must lie between 0 and {run.steps - 1}, so that the run comes to its learning rate, not "
            f"{run.warmup_steps}"
        )
    if run.quantization is not None:
        check_quantization(run, run.quantization)
    check_step_rule(run, method)
    check_averaging(run, method)


def check_pieces(run: RunConfig, method: Method, processes: int = 1) -> None:
    """Raises UserError for minibatches that cannot be divided, among processes or in pieces, or not for this loss."""
    loss, batch, pieces = LOSSES[method.loss], run.batch_size, run.accumulate
    if pieces < 1:
        raise UserError(f"--accumulate must be at least 1, not {pieces}")
    if pieces > 1 and loss.whole_minibatch:
        raise UserError(
            f"--accumulate {pieces} would make another loss of {method.label}, which compares whole minibatches: use a "
            "smaller --batch-size, or --precision bfloat16"
        )
    if batch % processes:
        raise UserError(f"--batch-size {batch} cannot be divided among {processes} processes")
    each = f"give each{' process' if processes > 1 else ''}{' piece' if pieces > 1 else ''}"
    if batch // processes % pieces:
        of_each = " that each process has" if processes > 1 else ""
        raise UserError(f"--accumulate {pieces} does not divide the {batch // processes} images of a domain{of_each}")
    if batch // processes // pieces < loss.least_batch:
        needed = each if processes * pieces > 1 else "be"
        raise UserError(f"--batch-size must {needed} at least {loss.least_batch} for {method.label}")


def check_backbone(run: RunConfig) -> None:
    """Raises UserError for a network that does not take the data set's images, or settings that it has none of."""
    is_digits = run.dataset in DIGITS
    if is_digits != (run.backbone in DIGIT_NETWORKS):
        fitting = " or ".join(DIGIT_NETWORKS) if is_digits else "a timm model of RGB images, such as resnet50.tv_in1k"
        raise UserError(f"--backbone {run.backbone} does not take {run.dataset} images: use {fitting}")
    if is_digits:
        for name, none in _NOT_FOR_DIGITS.items():
            a_run = name == "weights" and Path(run.weights).is_dir()
            if getattr(run, name) != none and not a_run:
                but = ", but for the folder of a finished run" if name == "weights" else ": leave it out"
                raise UserError(f"--{dashed(name)} has no meaning for {run.backbone}{but}")


def check_numbers(run: RunConfig, method: Method) -> None:
    """Raises UserError for a rule's number that is outside its limits or none of its choices."""
    given = {**run.loss, **run.step, **run.averaging}
    for rule in method.rules().values():
        for name, number in numbers_of(rule).items():
            value = given[name]
            if get_origin(number.type) is Literal and value not in get_args(number.type):
                raise UserError(f"--{dashed(name)} must be {' or '.join(get_args(number.type))}, not {value}")
            if isinstance(value, int | float) and not number.least <= value <= number.most:
                raise UserError(f"--{dashed(name)} must be {number.limits}, not {value:g}")


def check_quantization(run: RunConfig, quantization: Quantization) -> None:
    """Raises UserError for quantization that cannot be, or never starts, in this run."""
    for name in ("weight_bits", "act_bits", "first_last_bits"):
        bits = getattr(quantization, name)
        if bits is not None and not 2 <= bits <= 8:
            raise UserError(f"--{dashed(name)} must be 2 to 8, not {bits}")
    if quantization.scale_lr < 0:
        raise UserError(f"--scale-lr must not be negative, not {quantization.scale_lr}")
    if not 0 <= quantization.switch_step < run.steps:
        raise UserError(
            f"quantization would start at step {quantization.switch_step}, which a run of {run.steps} steps never "
            f"reaches: give --switch-step (the paper's 40 % is {run.steps * 2 // 5}) or more --steps"
        )
    if quantization.quantizer == "inq":
        if quantization.qat_mode != "qat":
            raise UserError(f"--qat-mode {quantization.qat_mode} has no meaning for INQ, which rounds step by step")
        if len(quantization.snaps(run.steps)) < len(INQ_FRACTIONS):
            raise UserError(
                f"--steps {run.steps} leaves INQ no {len(INQ_FRACTIONS)} steps from the switch on: give more"
            )
    if run.averaging.get("average_start", quantization.switch_step) < quantization.switch_step:
        raise UserError(
            f"--average-start {run.averaging['average_start']} is before the switch at {quantization.switch_step}: an "
            "average of float and quantized training is neither, start it at the switch or later"
        )


def check_step_rule(run: RunConfig, method: Method) -> None:
    """Raises UserError for a step rule that has nothing to act on, or for a run that ends before it acts."""
    rule = STEPS[method.step](**run.step)
    quantization = run.quantization
    if rule.needs_scales:
        if quantization is None or quantization.quantizer != "lsq":
            raise UserError(f"--step {method.step} is about learned scales, which --quantizer lsq has")
        if quantization.qat_mode != "qat":
            raise UserError(
                f"--step {method.step} is about learned scales, which --qat-mode {quantization.qat_mode} has not"
            )
    first = quantization.switch_step if rule.needs_scales and quantization else 0
    number, least = rule.least_steps
    if run.steps - first < least:
        since = f" from the switch at {first} on" if first else ""
        raise UserError(
            f"--{dashed(number)} {least} is more than the {run.steps - first} steps of this run{since}, which would "
            f"end before {method.label} does anything of its own: give a smaller one or more --steps"
        )


def check_averaging(run: RunConfig, method: Method) -> None:
    """Raises UserError for an average that would never begin, or could not find what it looks for."""
    rule = AVERAGING[method.averaging](**run.averaging)
    if not isinstance(rule, FromStart):
        return
    if rule.average_start >= run.steps:
        raise UserError(
            f"--average-start {rule.average_start} is not reached in a run of {run.steps} steps, which would average "
            "nothing: give an earlier one or more --steps"
        )
    number, least = rule.least_checkpoints
    found = run.checkpoints_from(rule.average_start)
    if found < least:
        raise UserError(
            f"--{dashed(number)} {least} is more than the {found} checkpoints of this run from step "
            f"{rule.average_start} on: give a smaller one, a smaller --checkpoint-freq or more --steps"
        )


def check_minibatch(run: RunConfig, method: Method, domains: int, processes: int = 1) -> None:
    """Raises UserError for source domains, or minibatches, that are too few or too small for the method's loss.

    Args:
        domains: how many source domains there are.
        processes: among which each minibatch is divided.
    """
    loss = LOSSES[method.loss]
    if domains < loss.least_domains:
        raise UserError(
            f"{method.label} needs {loss.least_domains} source domains, here "
            f"{'is' if domains == 1 else 'are'} {domains}: with fewer it is another method, so name that one"
        )
    check_pieces(run, method, processes)
    if domains * (run.batch_size // processes // run.accumulate) < loss.least_images:
        raise UserError(
            f"{method.label} needs {loss.least_images} images that it computes together: use a larger --batch-size"
        )


def remarks(run: RunConfig, method: Method, domains: int) -> list[str]:
    """A line for each of the method's rules that by its numbers is another rule, or of one source domain is less."""
    loss, step = LOSSES[method.loss](**run.loss), STEPS[method.step](**run.step)
    told = []
    for kind, name, same in (("loss", method.loss, loss.same_as), ("step", method.step, step.same_as)):
        if same is not None:
            told.append(f"with these numbers the {kind} {name} is the {kind} {same}")
    if domains == 1 and loss.of_one_domain:
        told.append(f"one source domain: the loss {method.loss} {loss.of_one_domain}")
    return told
