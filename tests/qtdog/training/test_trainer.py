import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import qkernels as qk
from qtdog import load_model
from qtdog.cli import main
from qtdog.config import Quantization
from qtdog.errors import UserError
from qtdog.files import read_records
from qtdog.methods.algorithms import ERM, LOSSES
from qtdog.methods.presets import METHODS
from qtdog.methods.steps import Plain
from qtdog.models import DIGIT_NETWORKS, MNIST_CNN
from qtdog.results import metrics
from qtdog.results.predictions import Predictions
from qtdog.results.runs import checkpoint_records, read_card
from qtdog.training import quantization, trainer
from qtdog.training.evaluation import mean_out_accuracy
from tiny import DIGITS

QUANTIZATION = Quantization(switch_step=2, scale_lr=1e-3, weight_bits=7, granularity="channel")
TIMING = {"step_time", "eval_time"}


def steps(model, optimizer, count):
    torch.manual_seed(0)
    for _ in range(count):
        batch = [(torch.rand(4, 1, 28, 28), torch.randint(10, (4,)))]
        Plain()(lambda batch=batch: ERM()(model, batch), model, optimizer)


def membership(model, optimizer):
    """How often each trainable parameter stands in the optimizer."""
    known = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return {name: known.count(id(p)) for name, p in model.named_parameters() if p.requires_grad}


def published_switch(model):
    """What the released QT-DoG code does: quantized layers with NEW Parameters, and the old optimizer."""
    qk.enable_(model)
    for module in model.modules():
        if isinstance(module, qk.QConv2d):
            module.weight = nn.Parameter(module.latent_weight.detach().clone())
            module.weight_scale = nn.Parameter(module.weight_scale.detach().clone())


@pytest.mark.parametrize("published", [False, True])
def test_all_parameters_are_trained_after_the_switch(published):
    model = MNIST_CNN(1, 10)
    report = quantization.prepare(model, QUANTIZATION)
    optimizer = torch.optim.Adam(qk.param_groups(model, lr=1e-3))
    steps(model, optimizer, 2)
    if published:
        published_switch(model)
    else:
        quantization.switch(model, QUANTIZATION, report)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert sum(name.endswith("weight_scale") for name in before) == 4
    steps(model, optimizer, 3)
    once = {name for name, times in membership(model, optimizer).items() if times == 1}
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    stuck = {f"conv{i}.weight{suffix}" for i in (1, 2, 3, 4) for suffix in ("", "_scale")}
    if published:  # the test can tell the published behavior
        assert once == moved == set(before) - stuck
    else:
        assert once == moved == set(before)


def test_erm_is_the_mean_over_all_domains_images():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 3))
    batches = [(torch.rand(2, 2), torch.tensor([0, 1])), (torch.rand(4, 2), torch.tensor([2, 1, 0, 0]))]
    each = [-model(x).log_softmax(1)[i, y] for x, ys in batches for i, y in enumerate(ys)]
    torch.testing.assert_close(ERM()(model, batches), torch.stack(each).mean())


def records(folder):
    return checkpoint_records(Path(folder))


def untimed(folder):
    return [{k: v for k, v in r.items() if k not in TIMING} for r in records(folder)]


def test_run_folder_holds_what_it_should(trained):
    folder = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed1"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock", "config.yaml", "out.txt", "images.csv", "checkpoints.jsonl", "results.jsonl", "checkpoint.pt",
        "model.safetensors", "model.json", "done",
    }  # fmt: skip
    rows = records(folder)
    assert [r["step"] for r in rows] == [0, 2, 4, 6, 8]
    assert [r["quantized"] for r in rows] == [False, False, True, True, True]
    assert read_records(folder / "results.jsonl") == rows[2:]
    last = rows[-1]
    assert {f"env{i}_{part}_acc" for i in range(6) for part in ("in", "out")} <= last.keys()
    assert last["args"]["test_envs"] == [0] and last["args"]["algorithm"] == "QT-DoG" and last["args"]["seed"] == 1
    assert last["epoch"] == pytest.approx(8 * 2 / 16) and last["environment"]["torch"] == torch.__version__
    assert last["hparams"]["quantization"]["switch_step"] == 4 and "120 digits" in last["data_source"]
    out = (folder / "out.txt").read_text()
    assert "method preset qtdog" in out and "changed steps=9" in out and "environment: qtdog" in out
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 8 and "conv1.weight_scale" in checkpoint["model"]


@pytest.mark.slow
@pytest.mark.parametrize(("smallest", "images"), [("dark", 6), ("bright", 8)])
def test_an_epoch_is_that_of_the_smallest_domain_be_it_the_target(pictures, tmp_path, smallest, images):
    """The target is dark; a domain has 20 pictures or fewer. DomainBed divides by the least of all in parts."""
    data = shutil.copytree(pictures, tmp_path / "data")
    for place in (data / smallest).iterdir():
        for file in sorted(place.iterdir())[images // 2 :]:
            file.unlink()
    arguments = ["train", "--dataset", "folder", "--data-dir", str(data), "--backbone", "test_resnet", "--weights",
                 "none", "--image-size", "16", "--test-envs", "dark", "--device", "cpu", "--steps", "4",
                 "--method", "erm", "--checkpoint-freq", "3", "--batch-size", "2", "--num-workers", "0",
                 "--output-dir", str(tmp_path / "runs")]  # fmt: skip
    assert main(arguments) == 0
    rows = records(tmp_path / "runs" / "data" / "erm" / "dark" / "trial0_seed0")
    inner = images - int(images * 0.2)
    assert [row["epoch"] for row in rows] == [0, 3 / (inner / 2)]


def test_selected_model_is_the_best_quantized_one(trained):
    for method, first in (("erm", 0), ("qtdog", 4)):
        folder = trained / "RotatedMNIST" / method / "0" / "trial0_seed0"
        card = read_card(folder)
        validation = {r["step"]: mean_out_accuracy(r, range(1, 6)) for r in records(folder) if r["step"] >= first}
        best = max(validation.values())
        assert card.selected_step == min(step for step, value in validation.items() if value == best)
        assert card.source_validation_accuracy == best
        row = next(r for r in records(folder) if r["step"] == card.selected_step)
        assert card.target_accuracy == row["env0_in_acc"]
        assert card.accuracies.keys() == {
            f"env{i}_{part}_{name}" for i in range(6) for part in ("in", "out") for name in metrics.NAMES
        }


@pytest.mark.slow
@pytest.mark.parametrize(("method", "selected"), [("erm", 0), ("qtdog", 6)])
def test_no_selection_before_the_switch(digits_dir, tmp_path, monkeypatch, method, selected):
    """The best validation accuracy of all is before the switch; among the quantized, steps 6 and 8 are equal."""
    validation = iter([0.9, 0.8, 0.1, 0.5, 0.5])
    parts_seen: list[float] = []

    def pretended(predictions):
        if len(parts_seen) % 12 == 0:
            parts_seen.append(next(validation))
        else:
            parts_seen.append(parts_seen[-1])
        return {"acc": parts_seen[-1]}

    monkeypatch.setattr(Predictions, "metrics", pretended)
    flags = ["--switch-step", "4"] if method == "qtdog" else []
    output = tmp_path / "runs"
    assert main(["train", *DIGITS, "--data-dir", str(digits_dir), "--output-dir", str(output), "--steps", "9",
                 "--checkpoint-freq", "2", "--method", method, *flags]) == 0  # fmt: skip
    card = read_card(output / "RotatedMNIST" / method / "0" / "trial0_seed0")
    assert card.selected_step == selected


def test_load_model_gives_the_selected_model(trained, digits_dir):
    from qtdog.data import load_dataset
    from qtdog.data.splits import split

    folder = trained / "RotatedMNIST" / "qtdog" / "0" / "trial0_seed0"
    model = load_model(folder)
    assert isinstance(model.conv1, qk.QConv2d) and not model.training and type(model.classifier) is nn.Linear
    target = load_dataset("RotatedMNIST", str(digits_dir), None).domains[0]
    inner, _ = split(20, 0.2, 0, 0)
    correct = model(target.images(inner, augment=False)).argmax(1) == target.labels[inner]
    card = read_card(folder)
    assert correct.double().mean().item() == card.target_accuracy
    assert card.nbytes < 0.25 * card.float_nbytes
    assert not isinstance(load_model(trained / "RotatedMNIST" / "erm" / "0" / "trial0_seed0").conv1, qk.QConv2d)


def test_finished_run_is_not_run_again(trained, digits_dir, capsys):
    folder = trained / "RotatedMNIST" / "erm" / "0" / "trial0_seed0"
    before = (folder / "results.jsonl").stat().st_mtime_ns
    again = ["train", *DIGITS, "--data-dir", str(digits_dir), "--output-dir", str(trained), "--steps", "9",
             "--checkpoint-freq", "2", "--eval-train-images", "8", "--method", "erm"]  # fmt: skip
    assert main(again) == 0
    assert "is finished, not run again" in capsys.readouterr().out
    assert (folder / "results.jsonl").stat().st_mtime_ns == before
    assert main([*again, "--lr", "0.1"]) == 2
    assert "lr was 0.001, is now 0.1" in capsys.readouterr().err
    assert main([*again, "--resume", "--overwrite"]) == 2


def quick(digits_dir, output, *more):
    return ["train", *DIGITS, "--data-dir", str(digits_dir), "--output-dir", str(output), "--method", "erm",
            "--checkpoint-freq", "1", "--eval-train-images", "4", *more]  # fmt: skip


@pytest.mark.slow
def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(digits_dir, tmp_path, capsys, monkeypatch):
    calls = []

    class Failing(ERM):
        def __call__(self, model, batches):
            calls.append(None)
            return super().__call__(model, batches) * (math.nan if len(calls) == 3 else 1)

    monkeypatch.setitem(LOSSES, "erm", Failing)
    assert main(quick(digits_dir, tmp_path, "--steps", "6")) == 2
    message = capsys.readouterr().err
    assert "the loss is nan at step 2" in message and message.count("\n") == 1
    folder = tmp_path / "RotatedMNIST" / "erm" / "0" / "trial0_seed0"
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 1
    assert not (folder / "done").exists()
    assert main(quick(digits_dir, tmp_path, "--steps", "6")) == 2
    assert "continue with --resume" in capsys.readouterr().err
    assert main(quick(digits_dir, tmp_path, "--steps", "6", "--resume")) == 0
    assert [r["step"] for r in records(folder)] == list(range(6))


class ReadsWeights(nn.Module):
    """A network that multiplies by the weight of a layer that it does not call."""

    def __init__(self, channels, classes):
        super().__init__()
        self.stem, self.read, self.fc = nn.Linear(784 * channels, 16), nn.Linear(16, 16), nn.Linear(16, classes)

    def forward(self, x):
        return self.fc((self.stem(x.flatten(1)).relu() @ self.read.weight).relu())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the inputs of read stay float")
def test_a_network_that_reads_weights_resumes_and_loads(digits_dir, tmp_path, monkeypatch):
    """The input of the layer that is read only is found to stay float after the switch; the files know."""
    monkeypatch.setitem(DIGIT_NETWORKS, "READS", ReadsWeights)
    flags = ["--method", "lsq", "--act-bits", "4", "--switch-step", "1", "--backbone", "READS", "--steps", "4"]
    train_on = trainer.Trainer.train_on

    def stopping(self, batch, step):
        if step == 3:
            raise UserError("stopped")
        return train_on(self, batch, step)

    assert main(quick(digits_dir, tmp_path / "whole", *flags)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_on", stopping)
        assert main(quick(digits_dir, tmp_path / "resumed", *flags)) == 2
    assert main(quick(digits_dir, tmp_path / "resumed", *flags, "--resume")) == 0
    whole, resumed = (load_model(tmp_path / part / "RotatedMNIST/lsq/0/trial0_seed0") for part in ("whole", "resumed"))
    assert whole.read.act_quantizer is None and whole.stem.act_range is not None
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(whole(x), resumed(x))


@pytest.mark.slow
def test_a_run_that_an_earlier_version_began_is_refused(digits_dir, tmp_path, capsys, monkeypatch):
    """Its optimizer knows no scales before the switch, and its scales have no dimension."""
    flags = quick(digits_dir, tmp_path, "--method", "qtdog", "--steps", "6", "--switch-step", "4")
    train_on, read = trainer.Trainer.train_on, trainer.read_checkpoint

    def stopping(self, batch, step):
        if step == 3:
            raise UserError("stopped")
        return train_on(self, batch, step)

    def earlier(folder, log):
        stored = read(folder, log)
        stored["model"] = {n: t for n, t in stored["model"].items() if not n.endswith(("scale", "_extra_state"))}
        return stored

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_on", stopping)
        assert main(flags) == 2
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "read_checkpoint", earlier)
        assert main([*flags, "--resume"]) == 2
    assert "was begun by an earlier version of qtdog" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["erm", "gaqat", "coral", "qtdog"])
def test_mixed_precision(digits_dir, tmp_path, monkeypatch, method, precision):
    """Products in half precision, weights, losses and evaluation in float32, and nearly the same training."""
    layers, evaluated = set(), set()
    rule, predict_images = LOSSES[METHODS[method].loss], trainer.predict_images

    class Watched(rule):
        def __call__(self, model, batches):
            conv = model.block2.conv
            handle = conv.register_forward_hook(lambda module, inputs, output: layers.add(output.dtype))
            loss = super().__call__(model, batches)
            handle.remove()
            assert loss.dtype == torch.float32
            return loss

    def judged(network, images, device):
        evaluated.add(network(next(iter(images))[0]).dtype)
        return predict_images(network, images, device)

    monkeypatch.setattr(trainer, "predict_images", judged)
    whole = ["train", *DIGITS, "--dataset", "ColoredMNIST", "--data-dir", str(digits_dir), "--method", method]
    whole += ["--steps", "5", "--checkpoint-freq", "2", "--eval-train-images", "4"]
    whole += ["--backbone", "SMALL_CNN"]  # CPUs are slow at products of float16
    whole += {"qtdog": ["--switch-step", "2"], "gaqat": ["--disorder-window", "4"]}.get(method, [])
    assert main([*whole, "--output-dir", str(tmp_path / "float32")]) == 0
    monkeypatch.setitem(LOSSES, METHODS[method].loss, Watched)
    assert main([*whole, "--output-dir", str(tmp_path / precision), "--precision", precision]) == 0
    assert layers == {getattr(torch, precision)} and evaluated == {torch.float32}
    place = Path("ColoredMNIST") / method / "+90%" / "trial0_seed0"
    single, half = records(tmp_path / "float32" / place), records(tmp_path / precision / place)
    assert [r["loss"] for r in half] != [r["loss"] for r in single]
    assert [r["loss"] for r in half] == pytest.approx([r["loss"] for r in single], rel=0.1)
    stored = torch.load(tmp_path / precision / place / "checkpoint.pt", weights_only=True)
    assert all(v.dtype == torch.float32 for v in stored["model"].values() if v.is_floating_point())
    assert (stored["scaler"] is not None) == (precision == "float16")


@pytest.mark.slow
def test_resumed_float16_keeps_its_loss_scale(digits_dir, tmp_path, monkeypatch):
    """A loss scale that is too large halves at every step that it spoils; a resumed run does not start over."""
    run, stop, scales = trainer.Trainer.checkpoint, [], []

    def interrupted(self, step, *rest):
        run(self, step, *rest)
        scales.append(self.scaler.get_scale())
        if step == 1 and not stop:
            stop.append(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "checkpoint", interrupted)
    monkeypatch.setattr(trainer.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    arguments = quick(digits_dir, tmp_path, "--steps", "4", "--precision", "float16", "--backbone", "SMALL_CNN")
    assert main(arguments) == 130
    assert main([*arguments, "--resume"]) == 0
    assert scales == [2.0**39, 2.0**38, 2.0**37, 2.0**36]


@pytest.mark.slow
def test_resume_on_other_data_is_refused(digits_dir, tmp_path, capsys, monkeypatch):
    run, stop = trainer.Trainer.checkpoint, []

    def interrupted(self, step, *rest):
        run(self, step, *rest)
        if step == 1 and not stop:
            stop.append(step)
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "checkpoint", interrupted)
    arguments = quick(digits_dir, tmp_path, "--steps", "3")
    assert main(arguments) == 130
    assert f"continue with: qtdog {' '.join(arguments)} --resume" in capsys.readouterr().err
    moved = shutil.copytree(digits_dir, tmp_path / "moved")
    elsewhere = [str(moved) if argument == str(digits_dir) else argument for argument in arguments]
    pixels = moved / "MNIST" / "raw" / "train-images-idx3-ubyte"
    whole = pixels.read_bytes()
    pixels.write_bytes(whole[:-400] + bytes(400))  # of the last digit
    assert main([*elsewhere, "--resume"]) == 2
    assert re.search(r"was begun on other data \(1 changed \(\d+/9/\d+\)\)", capsys.readouterr().err)
    pixels.write_bytes(whole)
    assert main([*elsewhere, "--resume"]) == 0
    assert main(elsewhere) == 0
    pixels.write_bytes(whole[:-400] + bytes(400))
    assert main(elsewhere) == 2
    assert "was trained on other data (1 changed" in capsys.readouterr().err
    assert main([*elsewhere, "--overwrite"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("killed_after", [1, 5], ids=["before the switch", "after the switch"])
def test_resume_after_sigkill_is_bit_identical(pictures, tmp_path, killed_after):
    """With dropout, augmentation, frozen BN and another number of workers; the switch is at step 9."""
    shared = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--backbone", "test_resnet",
              "--weights", "none", "--image-size", "16", "--dropout", "0.3", "--test-envs", "dark", "--device", "cpu",
              "--steps", "24", "--checkpoint-freq", "3", "--switch-step", "9", "--batch-size", "4",
              "--lr", "1e-3"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*shared, "--num-workers", "0", "--output-dir", str(whole)]) == 0
    place = Path("tints") / "qtdog" / "dark" / "trial0_seed0"
    results = killed / place / "results.jsonl"
    command = [sys.executable, "-m", "qtdog", *shared, "--num-workers", "1", "--output-dir", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not results.exists() or len(results.read_text().splitlines()) <= killed_after:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / place / "done").exists()
    assert main([*shared, "--num-workers", "0", "--output-dir", str(killed), "--resume"]) == 0
    assert "resumed after step" in (killed / place / "out.txt").read_text()

    def comparable(folder):
        rows = untimed(folder)
        for row in rows:
            del row["args"]["output_dir"]
        return json.dumps(rows)

    assert comparable(whole / place) == comparable(killed / place)
    assert len(records(whole / place)) == 9
    assert (whole / place / "model.safetensors").read_bytes() == (killed / place / "model.safetensors").read_bytes()
    one = torch.load(whole / place / "checkpoint.pt", weights_only=True)
    two = torch.load(killed / place / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
    scales = [value for name, value in one["model"].items() if name.endswith("weight_scale")]
    assert scales and safetensors.torch.load_file(whole / place / "model.safetensors").keys() == one["model"].keys()


def test_callers_random_state_is_untouched(digits_dir, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert main(quick(digits_dir, tmp_path, "--steps", "1")) == 0
    assert torch.equal(before, torch.get_rng_state())
