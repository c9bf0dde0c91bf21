"""Every preset trains through the command line, resumes bit for bit, and says what it is made of."""

import csv
import json
import math

import pytest
import torch
import yaml

import qkernels as qk
from qtdog import load_model
from qtdog.cli import main
from qtdog.config import INQ_FRACTIONS, RunConfig, TrainConfig
from qtdog.errors import UserError
from qtdog.files import parse_records, read_records
from qtdog.methods.presets import (
    ENSEMBLES,
    METHODS,
    changed_from_preset,
    method_names,
    method_of,
    rule_numbers,
    seeds_of,
    settle,
)
from qtdog.results.runs import read_card
from qtdog.training import trainer
from tiny import DIGITS

PICTURES = ["PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet"]
SHORT = {  # so that what takes long in a real run happens in seven steps
    "sma": ["--average-start", "2"],
    "swad": ["--swad-converge", "2", "--swad-tolerance", "2"],
    "qtdog+swad": ["--swad-converge", "1", "--swad-tolerance", "1"],
    "gaqat": ["--disorder-window", "2"],
    "fqat": ["--disorder-window", "2", "--disorder-threshold", "0.6"],
}
LOOP = ["--sampling", "balanced", "--accumulate", "2", "--schedule", "cosine", "--warmup-steps", "3"]
VARIANTS = {  # of presets, by other choices of their numbers
    "swad, paper": ("swad", ["--swad-valley", "paper"]),
    "swad, released, early": ("swad", ["--swad-converge", "2", "--swad-tolerance", "3"]),
    "qtdog, loop": ("qtdog", LOOP),
    "gaqat, loop": ("gaqat", LOOP),
    "mixstyle+qtdog, loop": ("mixstyle+qtdog", LOOP),
}


def flags(method):
    switched = METHODS[method].quantizer is not None and "switch_step" not in METHODS[method].numbers.get("all", {})
    return [*SHORT.get(method, []), *(["--switch-step", "3"] if switched else [])]


def train(digits_dir, output, method, *more):
    common = ["--dataset", "ColoredMNIST", "--data-dir", str(digits_dir), "--output-dir", str(output)]
    short = ["--steps", "7", "--checkpoint-freq", "2", "--eval-train-images", "2"]
    return main(["train", *DIGITS, *common, "--method", method, *short, *flags(method), *more])


def folder_of(output, method):
    return output / "ColoredMNIST" / method / "+90%" / "trial0_seed0"


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def without_times(record):
    return {key: value for key, value in record.items() if key not in ("step_time", "eval_time", "args")}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, *VARIANTS])
def test_trains_and_resumes_bit_for_bit(digits_dir, tmp_path, monkeypatch, name):
    method, more = VARIANTS.get(name, (name, []))
    assert train(digits_dir, tmp_path / "whole", method, *more) == 0
    checkpoint = trainer.Trainer.checkpoint

    def interrupted(self, step, *rest):
        checkpoint(self, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "checkpoint", interrupted)
    assert train(digits_dir, tmp_path / "parts", method, *more) == 130
    monkeypatch.undo()
    assert train(digits_dir, tmp_path / "parts", method, *more, "--resume") == 0
    whole, parts = (folder_of(tmp_path / name, method) for name in ("whole", "parts"))
    assert (whole / "model.safetensors").read_bytes() == (parts / "model.safetensors").read_bytes()
    one, two = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, parts))
    for state in (one, two):
        state["records"] = [without_times(record) for record in parse_records(state["records"])]
    assert equal(one, two)
    assert (whole / "disorder.csv").is_file() == (METHODS[method].step == "gaqat")
    if METHODS[method].step == "gaqat":
        assert (whole / "disorder.csv").read_text() == (parts / "disorder.csv").read_text()
        rows = list(csv.DictReader((whole / "disorder.csv").open()))
        assert {row["steps"] for row in rows} == {"2", "4", "6"}
        assert "conv2.act_scale" in {row["scale"] for row in rows}

    card, records = read_card(whole), read_records(whole / "results.jsonl")
    model = load_model(whole)
    assert isinstance(model.conv1, qk.QConv2d) == (METHODS[method].quantizer is not None)
    assert model(torch.rand(1, 2, 28, 28)).isfinite().all()
    averaging = METHODS[method].averaging
    assert [r["averaged"] for r in records][-1] == (averaging != "none")
    assert f"averaging {averaging}" in (whole / "out.txt").read_text()
    if averaging == "swad":
        assert card.selected_step == records[-1]["step"] and "the end of the run" in card.selection
        told = "as in the paper" if "paper" in more else "as in the released code"
        for text in (card.selection, (whole / "out.txt").read_text()):
            assert f"SWAD's valley {told}" in text
        assert not any(r["averaged"] for r in records[:-1])
    if averaging == "sma":
        first = 2 if method == "sma" else 3
        assert [r["averaged"] for r in records] == [r["step"] >= first for r in records]
    if more is LOOP:
        assert "schedule=cosine" in (whole / "out.txt").read_text() and records[-1]["hparams"]["accumulate"] == 2
        assert yaml.safe_load((whole / "config.yaml").read_text())["sampling"] == "balanced"
        rates = [group["lr"] for group in one["optimizer"]["param_groups"]]  # of step 6, the last of a half wave from 3
        factor = (1 + math.cos(math.pi * 3 / 4)) / 2
        assert rates[0] == pytest.approx(card.run.lr * factor)
        assert rates[1] == pytest.approx(card.run.quantization.scale_lr * factor)
    if METHODS[method].quantizer is not None:
        first = {"qtdog-inq": 6}.get(method, 0 if "lsq" in method or "qat" in method else 3)
        assert [r["quantized"] for r in records] == [r["step"] >= first for r in records]
        assert card.selected_step >= first


@pytest.mark.slow
def test_lsq_quantizes_inputs_with_first_and_last_layer_at_8_bits(digits_dir, tmp_path):
    assert train(digits_dir, tmp_path, "lsq", "--weight-bits", "3", "--act-bits", "3") == 0
    model = load_model(folder_of(tmp_path, "lsq"))
    layers = [model.conv1, model.conv2, model.conv3, model.conv4, model.classifier]
    assert [m.weight_quantizer.bits for m in layers] == [m.act_quantizer.bits for m in layers] == [8, 3, 3, 3, 8]
    assert model.conv1.act_range == (0, 255) and model.conv2.act_range == (-4, 3)  # after GroupNorm


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rtn-frozen", "frozen-backbone"])
def test_frozen_modes_train_norm_layers_and_head_alone(digits_dir, tmp_path, mode):
    assert train(digits_dir, tmp_path, "qtdog", "--qat-mode", mode) == 0
    folder = folder_of(tmp_path, "qtdog")
    card, model, records = read_card(folder), load_model(folder), read_records(folder / "results.jsonl")
    quantized = mode == "rtn-frozen"
    assert isinstance(model.conv1, qk.QConv2d) == quantized
    assert records[-1]["quantized"] == quantized and card.selected_step >= 4
    assert card.nbytes < 0.3 * card.float_nbytes if quantized else card.nbytes == card.float_nbytes
    end = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert train(digits_dir, tmp_path / "short", "qtdog", "--qat-mode", mode, "--steps", "5") == 0
    start = torch.load(tmp_path / "short" / folder.relative_to(tmp_path) / "checkpoint.pt", weights_only=True)
    changed = {name for name, value in end["model"].items() if not torch.equal(value, start["model"][name])}
    assert {name.partition(".")[0] for name in changed} == {"bn0", "bn1", "bn2", "bn3", "classifier"}


@pytest.mark.slow
def test_inq_ends_at_powers_of_two(digits_dir, tmp_path):
    assert train(digits_dir, tmp_path, "qtdog-inq") == 0
    folder = folder_of(tmp_path, "qtdog-inq")
    model = load_model(folder)
    mantissa, _ = torch.frexp(model.conv2.quantized_weight().abs())
    assert set(mantissa.unique().tolist()) <= {0.0, 0.5}
    assert len(model.conv2.quantized_weight().unique()) <= 127
    log = (folder / "out.txt").read_text()
    assert all(f"{fraction:.1%} of the weights frozen" in log for fraction in INQ_FRACTIONS)


@pytest.mark.slow
def test_batch_norm_that_trains_is_estimated_for_averages(pictures, tmp_path):
    arguments = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--backbone", "test_resnet", "--weights",
                 "none", "--image-size", "16", "--test-envs", "dark", "--device", "cpu", "--steps", "3", "--method",
                 "sma", "--checkpoint-freq", "2", "--batch-size", "4", "--freeze-bn", "false", "--average-start", "0",
                 "--num-workers", "0", "--output-dir", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    folder = tmp_path / "tints" / "sma" / "dark" / "trial0_seed0"
    selected = load_model(folder).state_dict()
    trained = torch.load(folder / "checkpoint.pt", weights_only=True)["model"]
    name = next(n for n in trained if n.endswith("running_mean"))
    assert selected[name.replace("running_mean", "num_batches_tracked")] == trainer.STATISTICS_BATCHES
    assert not torch.equal(selected[name], trained[name])


@pytest.mark.slow
def test_transformer_at_another_image_size(pictures, tmp_path):
    arguments = ["train", "--dataset", "folder", "--data-dir", str(pictures), "--backbone", "test_vit", "--weights",
                 "none", "--image-size", "32", "--test-envs", "dark", "--device", "cpu", "--steps", "3",
                 "--method", "gaqat", "--disorder-window", "2", "--dropout", "0.1", "--checkpoint-freq", "1",
                 "--batch-size", "2", "--num-workers", "0", "--output-dir", str(tmp_path)]  # fmt: skip
    assert main(arguments) == 0
    model = load_model(tmp_path / "tints" / "gaqat" / "dark" / "trial0_seed0")
    assert model.patch_embed.grid_size == (2, 2)
    assert isinstance(model.blocks[0].attn.qkv, qk.QLinear) and isinstance(model.blocks[0].mlp.fc1, qk.QLinear)


def test_backbones_of_the_papers_have_short_names():
    assert settled("qtdog", "PACS", backbone="deit-s").backbone == "deit_small_patch16_224.fb_in1k"
    assert settled("qtdog", "PACS", backbone="resnet-50").backbone == settled("qtdog", "PACS").backbone


# the presets' numbers ---------------------------------------------------------------------------------------------


def test_names():
    assert set(method_names()) == METHODS.keys() | ENSEMBLES.keys()
    assert {"erm", "sam", "sagm", "coral", "mixstyle", "swad", "eoa", "qtdog", "eoq", "coral+qtdog", "mixstyle+qtdog",
            "qtdog-inq", "weight-noise", "lsq", "lsq+sagm", "gaqat", "fqat"} <= set(method_names())  # fmt: skip
    labels = [label for m in METHODS.values() for label in (m.label, m.ensemble_label)]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("dataset", [*PICTURES, "RotatedMNIST", "folder"])
def test_every_preset_settles_unchanged(method, dataset):
    config = TrainConfig(dataset=dataset, method=method)
    run = settle(config, test_env=0, seed=0)
    assert changed_from_preset(run) == {} and run.method == method_of(method)


def settled(method, dataset, **given):
    numbers = {name: given.pop(name) for name in rule_numbers() if name in given}
    return settle(TrainConfig(method=method, dataset=dataset, numbers=numbers, **given), test_env=0, seed=0)


def test_numbers_of_the_papers():
    assert settled("sam", "PACS").step == {"rho": 0.05}
    for dataset, lr, alpha, decay in (
        ("PACS", 3e-5, 1e-3, 1e-4),
        ("VLCS", 1e-5, 1e-3, 1e-4),
        ("OfficeHome", 1e-5, 5e-4, 1e-4),
        ("TerraIncognita", 1e-5, 1e-3, 1e-4),
        ("DomainNet", 3e-5, 5e-4, 1e-6),
    ):
        for method in ("sagm", "lsq+sagm", "gaqat"):
            run = settled(method, dataset)
            assert (run.lr, run.step["alpha"], run.step["rho"], run.weight_decay) == (lr, alpha, 0.05, decay)
            assert (run.dropout, run.checkpoint_freq) == (0.5, 100)
    assert settled("fqat", "DomainNet").checkpoint_freq == 100 and settled("lsq", "DomainNet").checkpoint_freq == 1000
    assert settled("sagm", "RotatedMNIST").lr == 1e-3 and settled("sagm", "RotatedMNIST").dropout == 0
    assert [settled("gaqat", d).step["disorder_window"] for d in ("PACS", "DomainNet")] == [350, 2111]
    assert settled("fqat", "PACS").step["freeze_granularity"] == "layer"
    gaqat = settled("gaqat", "DomainNet").quantization
    assert (gaqat.switch_step, gaqat.weight_bits, gaqat.act_bits, gaqat.first_last_bits) == (0, 4, 4, 8)
    assert gaqat.granularity == "tensor"
    swad = {d: settled("swad", d) for d in PICTURES}
    assert [run.checkpoint_freq for run in swad.values()] == [100, 50, 100, 100, 500]
    assert [run.averaging["swad_ratio"] for run in swad.values()] == [0.3, 0.2, 0.3, 0.3, 0.3]
    assert {run.averaging["average_start"] for run in swad.values()} == {0}
    assert {(run.averaging["swad_converge"], run.averaging["swad_tolerance"]) for run in swad.values()} == {(3, 6)}
    assert settled("sma", "PACS").averaging == {"average_start": 100}
    assert settled("qtdog+sma", "PACS").averaging == {"average_start": 2000}
    qtdog = settled("qtdog", "DomainNet")
    assert (qtdog.steps, qtdog.quantization.switch_step) == (15001, 8000)
    assert settled("coral", "PACS").loss == {"coral_weight": 1.0}
    assert settled("mixstyle", "PACS").loss == {"mixstyle_p": 0.5, "mixstyle_alpha": 0.1}
    assert settled("qtdog-inq", "PACS").quantization.quantizer == "inq"


def test_settings_come_from_presets_unless_given():
    run = settle(TrainConfig(dataset="folder"), test_env=1, seed=4)
    assert (run.steps, run.checkpoint_freq, run.batch_size, run.lr) == (5001, 300, 32, 5e-5)
    assert run.quantization.switch_step == 2000 and run.quantization.weight_bits == 7 and run.freeze_bn
    assert run.backbone == "resnet50.tv_in1k" and run.weights == "timm" and changed_from_preset(run) == {}
    digits = settle(TrainConfig(steps=10, switch_step=3, lr=0.5, method="qtdog"), test_env=0, seed=0)
    assert (digits.batch_size, digits.checkpoint_freq, digits.backbone) == (64, 100, "MNIST_CNN")
    assert changed_from_preset(digits) == {"steps": 10, "lr": 0.5, "switch_step": 3}
    assert settle(TrainConfig(method="erm"), 0, 0).quantization is None
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_ensembles_are_several_seeds_of_a_method():
    assert seeds_of(TrainConfig(method="eoq")) == [0, 1, 2, 3, 4] and method_of("eoq") == "qtdog"
    assert seeds_of(TrainConfig(method="eoa")) == [0, 1, 2, 3, 4, 5] and method_of("eoa") == "sma"
    assert seeds_of(TrainConfig(method="eoq", seeds=[7])) == [7] and seeds_of(TrainConfig()) == [0]


def test_inq_schedule():
    quantization = settled("qtdog-inq", "PACS").quantization
    assert quantization.snaps(5001) == {2000: 0.5, 2750: 0.75, 3500: 0.875, 4250: 1.0}
    assert quantization.complete_from(5001) == 4250


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"method": "erm", "rho": 0.1}, "--rho has no meaning for method erm"),
        ({"method": "sam", "alpha": 0.1}, "--alpha has no meaning for method sam"),
        ({"method": "eoq", "average_start": 3}, "--average-start has no meaning for method eoq"),
        ({"method": "sam", "act_bits": 4}, "--act-bits has no meaning for method sam, which does not quantize"),
        ({"method": "sam", "rho": -0.1}, "--rho must be at least 0"),
        ({"method": "gaqat", "disorder_threshold": 1.5}, "--disorder-threshold must be between 0 and 1"),
        ({"method": "gaqat", "disorder_window": 1}, "--disorder-window"),
        ({"method": "mixstyle", "mixstyle_p": 2.0}, "--mixstyle-p"),
        ({"method": "coral", "batch_size": 1}, "--batch-size must be at least 2 for CORAL"),
        ({"method": "lsq", "act_bits": 9}, "--act-bits must be 2 to 8"),
        ({"method": "qtdog-inq", "qat_mode": "rtn-frozen"}, "--qat-mode rtn-frozen has no meaning for INQ"),
        ({"method": "qtdog-inq", "steps": 2002}, "leaves INQ no 4 steps"),
        ({"method": "qtdog+sma", "average_start": 100}, "--average-start 100 is before the switch at 2000"),
    ],
)
def test_settings_that_make_no_sense(given, told):
    with pytest.raises(UserError, match=told):
        settled(**{"dataset": "RotatedMNIST", **given})


def test_help_has_headings(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"\n{title}:\n" in out for title in ("quantization", "step", "averaging", "loss"))
