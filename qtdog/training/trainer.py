"""Training one run: the loop, the switch to quantized weights, selection, checkpoints, resume."""

import datetime
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import qkernels as qk
from qtdog.config import Quantization, RunConfig
from qtdog.data import DomainSet, Preprocessing
from qtdog.data.image_lists import ImageList, difference
from qtdog.data.images import AUGMENTATIONS
from qtdog.data.loaders import training_batches
from qtdog.data.splits import seed_hash
from qtdog.distributed import is_first, mean, merged, rank, share, share_buffers, synchronized, world_size
from qtdog.environment import describe_environment
from qtdog.errors import UserError
from qtdog.files import parse_records, read_records, records_text, seal, write_records, write_text
from qtdog.log import Log
from qtdog.methods.algorithms import LOSSES
from qtdog.methods.averaging import AVERAGING, holding
from qtdog.methods.presets import find_method
from qtdog.methods.steps import STEPS, InPieces, unsynchronized
from qtdog.models import build_model, train_mode
from qtdog.results.predictions import of_several, predict_images
from qtdog.results.runs import CHECKPOINTS, RESULTS, SEALED, ModelCard, on_targets, save_model, task_of
from qtdog.training.checkpoints import BEFORE, read_checkpoint, remove_checkpoints, write_checkpoint
from qtdog.training.evaluation import domain_parts, evaluation_images, mean_loss, mean_out_accuracy, sources
from qtdog.training.facts import facts
from qtdog.training.quantization import may_be_selected, prepare, scale_sizes, switch
from qtdog.training.schedule import rate_factor, set_rates
from qtdog.training.starting import refuse_seen_targets, start_from_run, starts_from_run, trained_before

STATISTICS_BATCHES = 20


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of our own; on leaving, the caller's generators are as before. cuDNN without nondeterminism."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.backends.cudnn.flags(deterministic=True, benchmark=False):
        torch.manual_seed(seed)
        yield


def train(
    run: RunConfig,
    dataset: DomainSet,
    folder: Path,
    preprocessing: Preprocessing | None,
    device: torch.device,
    workers: int = 0,
    shown: bool = True,
    count: Callable[[int], object] = lambda steps: None,
) -> ModelCard:
    """Train one run in `folder`, from its last checkpoint if there is one, and write the selected model there.

    Args:
        workers: processes that read images.
        shown: print the log, which is kept in `folder` in any case, and on a terminal a progress bar.
        count: is told of steps as they are done.

    Raises:
        UserError: for a loss that is not finite (the last checkpoint stays), or data other than the checkpoint's.
    """
    with seeded(seed_hash(run.seed, "model"), device):
        trainer = Trainer(run, dataset, folder, device, workers, shown)
        trainer.restore()
        count(trainer.start)
        trainer.run_steps(count)
        return trainer.finish(preprocessing)


class Trainer:
    """The model, the optimizer and all else that changes while a run trains."""

    def __init__(
        self, run: RunConfig, dataset: DomainSet, folder: Path, device: torch.device, workers: int, shown: bool
    ) -> None:
        self.run, self.dataset, self.folder, self.device, self.workers = run, dataset, folder, device, workers
        self.method = find_method(run.method)
        self.sources = sources(run, dataset)
        self.target = task_of([domain.name for domain in dataset.domains], run)
        self.environment = describe_environment(device)
        self.log = Log(folder / "out.txt", shown)
        self.announce()

        parts = domain_parts(run, dataset)
        self.image_list = ImageList.of(dataset, parts).after(trained_before(run))
        names = [domain.name for domain in dataset.domains]
        targets = [names[env] for env in run.test_envs]
        refuse_seen_targets(run, targets, self.image_list)
        for told in self.image_list.copies(targets, [names[env] for env in self.sources]):
            self.log(told)
        self.train_parts = [parts[f"env{env}_in"] for env in self.sources]
        # An epoch is DomainBed's: of the smallest `in` part of all domains, the target's among them.
        self.epoch_images = min(len(parts[f"env{env}_in"].indices) for env in range(len(dataset.domains)))
        self.images = evaluation_images(run, dataset, parts, workers)
        channels = dataset.image_shape[0]
        size = dataset.image_shape[-1]
        weights = "none" if starts_from_run(run) else run.weights
        model = build_model(run.backbone, len(dataset.classes), channels, weights, run.dropout, self.log, size)
        if starts_from_run(run):
            start_from_run(model, run, self.log)
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.float_nbytes = qk.packed_nbytes(model)
        quantization = run.quantization
        self.quantized = prepare(self.model, quantization) if quantization else None  # what is, from the switch on
        # What is trained: the same model, in one or several processes.
        self.network = synchronized(self.model, some_unused=quantization is not None)
        scale_lr = quantization.scale_lr if quantization else None
        self.optimizer = torch.optim.Adam(qk.param_groups(model, run.lr, run.weight_decay, scale_lr))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.loss = LOSSES[self.method.loss](**run.loss)
        self.take_step = STEPS[self.method.step](**run.step)
        self.averaging = AVERAGING[self.method.averaging](**run.averaging)
        self.scaler = torch.amp.GradScaler(device.type) if run.precision == "float16" else None
        self.start = 0
        self.records: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None  # step, validation accuracy, accuracies, and the model's state dict

    def announce(self) -> None:
        """Say what runs; on which data, with which presets and versions, is kept and not said again for every run."""
        run = self.run
        self.log(
            f"{self.method.label} on {self.dataset.name}, target domain {self.target}, trial {run.trial_seed}, "
            f"seed {run.seed} -> {self.folder}"
        )
        for fact in facts(run, self.dataset, self.environment):
            self.log.keep(fact)

    def run_steps(self, count: Callable[[int], object]) -> None:
        """All steps from `start` on, with an evaluation and a checkpoint at every `checkpoint_freq`-th and the last."""
        run = self.run
        losses: list[float] = []
        began = time.perf_counter()
        train_mode(self.model, run.freeze_bn)
        bar_off = None if self.log.shown and is_first() else True  # None: off where there is no terminal
        bar = tqdm(total=run.steps, initial=self.start, desc=f"{self.method.label} {self.target}", disable=bar_off)
        with bar:
            for step, batch in enumerate(self.batches(self.start, run.steps), self.start):
                if self.averaging.finished:
                    self.log(f"the averaging rule ends the run before step {step}")
                    return
                self.quantize(step)
                losses.append(self.train_on(batch, step))
                if not math.isfinite(losses[-1]):
                    raise UserError(
                        f"the loss is {losses[-1]} at step {step} of {self.folder}: try a smaller --lr or --scale-lr; "
                        "the last checkpoint is kept"
                    )
                if step % run.checkpoint_freq == 0 or step == run.steps - 1:
                    mean_loss, step_time = sum(losses) / len(losses), (time.perf_counter() - began) / len(losses)
                    self.checkpoint(step, mean_loss, step_time)
                    losses, began = [], time.perf_counter()
                bar.update()
                count(1)

    def batches(self, start: int, stop: int, whole: bool = False) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """This process's share of the minibatches of these steps, or the `whole` of them.

        Each is one (images, labels) a source domain, on the device.
        """
        run = self.run
        augment, part = AUGMENTATIONS[run.augmentation].train, (0, 1) if whole else (rank(), world_size())
        balanced = run.sampling == "balanced"
        for batch in training_batches(
            self.train_parts, run.batch_size, run.seed, start, stop, self.workers, augment, part, balanced
        ):
            yield [
                (x.to(self.device, memory_format=torch.channels_last, non_blocking=True), y.to(self.device))
                for x, y in batch
            ]

    def quantize(self, step: int) -> None:
        """What the method's quantization has to do before the update of `step`."""
        quantization = self.run.quantization
        if quantization is None:
            return
        if step == quantization.switch_step:
            report = self.switch(quantization)
            what = "quantized" if quantization.makes_codes else "frozen"
            kept = ", ".join(report.skipped) or "none"
            self.log(f"step {step}: {len(report.quantized)} layers {what}, float layers: {kept}")
        snaps = quantization.snaps(self.run.steps)
        if step in snaps:
            qk.snap_(self.model, snaps[step])
            self.log(f"step {step}: {snaps[step]:.1%} of the weights frozen at powers of two")

    def switch(self, quantization: Quantization) -> qk.QuantizationReport:
        """Begin to quantize; all scales have gradients now, and frozen weights none."""
        assert self.quantized is not None
        switch(self.model, quantization, self.quantized)
        self.network = synchronized(self.model)
        return self.quantized

    def train_on(self, batch: list[tuple[Tensor, Tensor]], step: int) -> float:
        """One update; returns the loss before it."""
        run, size = self.run, len(batch[0][1]) // self.run.accumulate

        def loss_of(piece: int) -> Tensor:
            # Dropout's numbers are those of this step: whether or not the run was resumed, and in both passes of SAM.
            # Each process, and each piece, has other images: the first alone has the numbers of a whole minibatch.
            others = [rank(), piece] if piece else [rank()] if rank() else []
            torch.manual_seed(seed_hash(run.seed, "step", step, *others))
            images = [(x[piece * size : (piece + 1) * size], y[piece * size : (piece + 1) * size]) for x, y in batch]
            is_last = piece == run.accumulate - 1  # after which processes bring their gradients together
            with (
                nullcontext() if is_last else unsynchronized(self.network),
                torch.autocast(self.device.type, getattr(torch, run.precision), enabled=run.precision != "float32"),
            ):
                return self.loss(self.network, images)

        set_rates(self.optimizer, self.rates, rate_factor(run, step))
        torch.manual_seed(seed_hash(run.seed, "step rule", step))
        pieces = [partial(loss_of, piece) for piece in range(run.accumulate)]
        loss = InPieces(pieces) if run.accumulate > 1 else pieces[0]
        value = mean(self.take_step(loss, self.network, self.optimizer, self.scaler))
        self.averaging.update(self.model, step)
        return value.item()

    def evaluate(self, step: int) -> dict[str, Any]:
        """How good the model is after the update of `step`: metrics of every part, and whether it may be selected.

        Where the method averages weights, it is the averaged model. If it may be selected and is the best so far, it is
        kept.
        """
        run, averaging = self.run, self.averaging
        share_buffers(self.model)
        if averaging.needs_loss:
            self.model.eval()
            losses = [mean_loss(self.model, [self.images[f"env{env}_out"]], self.device) for env in self.sources]
            averaging.end_segment(step, sum(losses) / len(losses))
        final = step == run.steps - 1 or averaging.finished
        selectable = may_be_selected(run, step) and (final or not averaging.final_only)
        weights = averaging.averaged_weights()
        with holding(self.model, weights, None if run.freeze_bn else self.statistics_images()):
            measured = self.measure()
            validation = mean_out_accuracy(measured, self.sources)
            if selectable and (self.best is None or validation > self.best["validation"]):
                state = {name: value.detach().clone().cpu() for name, value in self.model.state_dict().items()}
                self.best = {"step": step, "validation": validation, "accuracies": measured, "model": state}
        train_mode(self.model, run.freeze_bn)
        return {**measured, "averaged": weights is not None, "selectable": selectable}

    def measure(self) -> dict[str, float]:
        """The metrics of all parts, named as DomainBed's env0_in_acc; the model is left in eval mode."""
        self.model.eval()
        names = list(self.images)
        network = of_several([self.model])
        own = {name: predict_images(network, self.images[name], self.device).metrics() for name in share(names)}
        return {f"{part}_{name}": value for part, of in merged(own, names).items() for name, value in of.items()}

    def statistics_images(self) -> Iterator[Tensor]:
        """Training images on which an averaged model's BatchNorm statistics are estimated, the same every time."""
        return (torch.cat([x for x, _ in batch]) for batch in self.batches(0, STATISTICS_BATCHES, whole=True))

    def checkpoint(self, step: int, loss: float, step_time: float) -> None:
        """Evaluate after the update of `step`, keep the model if it is the best so far, and write it all down."""
        began = time.perf_counter()
        evaluated = self.evaluate(step)
        quantization = self.run.quantization
        quantized = quantization is not None and quantization.makes_codes and may_be_selected(self.run, step)
        record = {
            "step": step,
            "epoch": step / (self.epoch_images / self.run.batch_size),
            "loss": loss,
            "step_time": step_time,
            "eval_time": time.perf_counter() - began,
            **evaluated,
            "quantized": quantized,
            "scales": scale_sizes(self.model),
            "data_source": self.dataset.source,
            "args": self.domainbed_args(),
            "hparams": self.run.to_dict(),
            "environment": self.environment,
        }
        if self.device.type == "cuda":
            record["mem_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.records.append(record)
        self.write_results()
        stored = {
            "step": step,
            "data": self.image_list.division,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step_rule": self.take_step.state_dict(),
            "averaging": self.averaging.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "best": self.best,
            "records": records_text(self.records),
        }
        if is_first():
            write_checkpoint(self.folder, stored)
        self.log(
            f"step {step:>5}  loss {loss:.4f}  source out {mean_out_accuracy(evaluated, self.sources):.4f}  "
            f"target in {on_targets(evaluated, self.run):.4f}  {step_time:.3f} s/step  "
            f"{'quantized' if quantized else 'float'}{', averaged' if evaluated['averaged'] else ''}"
        )

    def write_results(self) -> None:
        """The records of all checkpoints, of those that may be selected, and what the step rule has to tell."""
        if is_first():
            write_records(self.folder / CHECKPOINTS, self.records)
            write_records(self.folder / RESULTS, [r for r in self.records if r.get("selectable", True)])
            for name, text in self.take_step.files().items():
                write_text(self.folder / name, text)

    def restore(self) -> None:
        """Continue after the last checkpoint that is whole, if there is one."""
        stored = read_checkpoint(self.folder, self.log)
        if stored is None:
            if is_first():
                self.image_list.write(self.folder)
            return
        self.refuse_other_data(stored["data"])
        makes_codes = self.run.quantization is not None and self.run.quantization.makes_codes
        if makes_codes and not any(name.endswith("_extra_state") for name in stored["model"]):
            raise UserError(
                f"{self.folder} was begun by an earlier version of qtdog: finish it with that, or start it again with "
                "--overwrite"
            )
        self.start = stored["step"] + 1
        if self.run.quantization and self.start > self.run.quantization.switch_step:
            self.switch(self.run.quantization)
        if makes_codes:  # inputs of layers that the network does not call were found out, and left float
            qk.quantize_like_(self.model, stored["model"])
        self.model.load_state_dict(stored["model"])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.take_step.load_state_dict(stored["step_rule"])
        self.averaging.load_state_dict(stored["averaging"], self.device)
        if self.scaler:
            self.scaler.load_state_dict(stored["scaler"])
        self.best = stored["best"]
        if "records" in stored:
            self.records = parse_records(stored["records"])
        else:  # of an earlier version, whose results.jsonl may hold a record that will be made again
            self.records = [r for r in read_records(self.folder / RESULTS) if r["step"] < self.start]
        self.write_results()
        self.log(f"resumed after step {stored['step']}")

    def finish(self, preprocessing: Preprocessing | None) -> ModelCard:
        """Write the selected model and mark the run as done."""
        assert self.best is not None  # settings whose switch is never reached are refused before training
        quantization = self.run.quantization if self.run.quantization and self.run.quantization.makes_codes else None
        card = ModelCard(
            config=self.run.to_dict(),
            dataset=self.dataset.name,
            data_source=self.dataset.source,
            domains=[domain.name for domain in self.dataset.domains],
            target=self.target,
            classes=self.dataset.classes,
            image_shape=list(self.dataset.image_shape),
            preprocessing=preprocessing.to_dict() if preprocessing else None,
            backbone=self.run.backbone,
            quantization=quantization.qconfig().to_dict() if quantization else None,
            selection=self.selection(),
            selected_step=self.best["step"],
            source_validation_accuracy=self.best["validation"],
            accuracies=self.best["accuracies"],
            nbytes=qk.packed_nbytes(self.model),
            float_nbytes=self.float_nbytes,
            environment=self.environment,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            images=self.image_list.content,
        )
        if is_first():
            save_model(self.folder, self.best["model"], card)
            remove_checkpoints(self.folder, BEFORE)
            seal(self.folder, [*SEALED, *self.take_step.files()])
        if self.averaging.summary:
            self.log(self.averaging.summary)
        self.log(f"selected step {card.selected_step}, target accuracy {card.target_accuracy:.4f}")
        return card

    def selection(self) -> str:
        """How the model was chosen, for tables."""
        quantized = "quantized " if self.run.quantization and self.run.quantization.makes_codes else ""
        if self.averaging.final_only:
            how = f" ({self.averaging.summary})" if self.averaging.summary else ""
            return f"the {quantized}average at the end of the run, from source validation losses{how}"
        averaged = " of averaged weights" if self.method.averaging != "none" else ""
        return (
            f"source validation, the {quantized}checkpoint{averaged} with the best mean accuracy on the source "
            "domains' out parts"
        )

    def refuse_other_data(self, division: Any) -> None:
        """UserError if the run was begun on images other than those that are there now, or divided otherwise."""
        if division == self.image_list.division:
            return
        before = ImageList.read(self.folder)
        changed = "it was begun by an earlier version of qtdog"
        if before is not None:
            changed = difference(before, self.image_list) or "the images have another order"
        raise UserError(
            f"{self.folder} was begun on other data ({changed}): bring that back, or start again with --overwrite"
        )

    def domainbed_args(self) -> dict[str, Any]:
        """What DomainBed's result collector groups by."""
        return {
            "dataset": self.dataset.name,
            "algorithm": self.method.label,
            "task": "domain_generalization",
            "test_envs": list(self.run.test_envs),
            "trial_seed": self.run.trial_seed,
            "seed": self.run.seed,
            "hparams_seed": self.run.hparams_seed,
            "holdout_fraction": self.run.holdout_fraction,
            "steps": self.run.steps,
            "checkpoint_freq": self.run.checkpoint_freq,
            "data_dir": self.run.data_dir,
            "output_dir": str(self.folder),
        }
