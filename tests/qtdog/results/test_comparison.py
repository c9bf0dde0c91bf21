"""`qtdog compare`."""

import csv
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from made_up_runs import made_up_result, made_up_run, random_numbers, write_result
from qtdog.cli import main
from qtdog.errors import UserError
from qtdog.files import write_records
from qtdog.results.comparison import CompareConfig, Difference, compare
from qtdog.results.variants import settings_of


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs"


def write(folder, method, targets=(0, 1), trials=range(3), random=None, **settings):
    random = random or random_numbers(zlib.crc32(f"{method}{settings}".encode()))
    results = []
    for env in targets:
        for trial in trials:
            run = made_up_run(method, (env,), trial, **settings)
            place = folder / f"{method}{env}{trial}{settings}"
            results.append(made_up_result(run, random, place))
            write_result(results[-1])
    return results


def values(results, env, key="acc", scale=100):
    """Of the selected models, in the order of trials."""
    return np.array([scale * r.card.accuracies[f"env{env}_in_{key}"] for r in results if r.targets == [env]])


def read(folder, stem="comparison_erm_sam"):
    (comparison,) = json.loads((folder / f"{stem}.json").read_text())["comparisons"]
    return comparison, {one["target"]: one for one in comparison["differences"]}


def as_scipy(found, first, second, confidence=0.95):
    test = stats.ttest_rel(second, first)
    interval = test.confidence_interval(confidence)
    assert found["n"] == len(first)
    assert found["difference"] == pytest.approx((second - first).mean())
    assert found["stderr"] == pytest.approx(stats.sem(second - first))
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["p_value"] == pytest.approx(test.pvalue)


@pytest.mark.parametrize("metric", ["accuracy", "worst", "nll"])
def test_differences_as_scipys_paired_t_test(folder, metric, capsys):
    erm, sam = write(folder, "erm"), write(folder, "sam", targets=(0, 1, 2), trials=range(4))
    key, scale = ("nll", 1) if metric == "nll" else ("acc", 100)
    command = ["compare", str(folder), "--methods", "erm", "SAM", "--metric", metric, "--confidence", ".9"]
    assert main(command) == 0
    out = capsys.readouterr().out
    stem = "comparison_erm_SAM" + ("" if metric == "accuracy" else f"_{metric}")
    comparison, found = read(folder, stem)
    assert (comparison["first"], comparison["second"], comparison["metric"]) == ("ERM", "SAM", metric)
    assert list(found) == ["+90%", "+80%", *([] if metric == "worst" else ["Avg"]), "Worst"]
    first = [values(erm, env, key, scale) for env in (0, 1)]
    second = [values(sam, env, key, scale)[:3] for env in (0, 1)]
    as_scipy(found["+90%"], first[0], second[0], 0.9)
    as_scipy(found["+80%"], first[1], second[1], 0.9)
    worst = np.maximum if metric == "nll" else np.minimum
    as_scipy(found["Worst"], worst(*first), worst(*second), 0.9)
    if metric != "worst":
        as_scipy(found["Avg"], np.mean(first, 0), np.mean(second, 0), 0.9)
    text = (folder / f"{stem}.txt").read_text()
    assert text in out and "Left out, since ERM lacks them: +90% trial 3; +80% trial 3; -90% trials 0, 1, 2, 3." in text
    assert ("Less is better" if metric == "nll" else "More is better") in text and "90 % interval" in text
    shown = next(line for line in text.splitlines() if line.startswith("+90%")).split()
    assert shown[1] == f"{first[0].mean():.{3 if metric == 'nll' else 1}f}" and shown[-1] == "3"
    lines = list(csv.DictReader((folder / f"{stem}.csv").open()))
    assert [line["target"] for line in lines] == list(found)
    assert float(lines[0]["low"]) == found["+90%"]["low"] and lines[0]["first_method"] == "ERM"


def test_seeds_are_averaged_before_they_are_paired(folder):
    write(folder, "erm", targets=(0,), trials=(0, 1))
    zero, one = (write(folder, "sam", targets=(0,), trials=(0, 1), seed=seed) for seed in (0, 1))
    assert main(["compare", str(folder), "--methods", "erm", "sam"]) == 0
    _, found = read(folder)
    assert found["+90%"]["second"] == pytest.approx(np.mean([values(zero, 0), values(one, 0)]))


def test_a_target_with_one_pair_has_no_interval_and_none_with_two_is_refused(folder, capsys):
    write(folder, "erm", targets=(0,), trials=(0, 1))
    write(folder, "erm", targets=(1,), trials=(2,))
    sam = write(folder, "sam", trials=(0, 1, 2))
    assert main(["compare", str(folder), "--methods", "erm", "sam"]) == 0
    comparison, found = read(folder)
    assert found["+80%"]["n"] == 1 and found["+80%"]["low"] is found["+80%"]["p_value"] is None
    assert "One pair gives no interval: +80%." in comparison["notes"]
    assert "Avg" not in found  # no trial has both targets
    assert next(csv.DictReader((folder / "comparison_erm_sam.csv").open()))["n"] == "2"
    for result in sam:
        if result.card.run.trial_seed != 2:
            (result.folder / "done").unlink()
    assert main(["compare", str(folder), "--methods", "erm", "sam"]) == 2
    assert "no two trials of a target in common, and one gives no interval: train" in capsys.readouterr().err


def test_variants_are_told_apart_by_their_labels(folder, capsys):
    write(folder, "erm", trials=(0, 1))
    slow, fast = (write(folder, "sam", trials=(0, 1), lr=lr, seed=0) for lr in (1e-3, 1.5e-2))
    assert main(["compare", str(folder), "--methods", "erm", "sam"]) == 2
    error = capsys.readouterr().err
    assert (
        '--methods sam has several variants on ColoredMNIST, name one of them: "SAM, lr 0.001"; "SAM, lr 0.015"'
        in error
    )
    assert main(["compare", str(folder), "--methods", "sam, lr 0.001", "SAM, lr 0.015"]) == 0
    comparison, found = read(folder, "comparison_sam_lr_0.001_SAM_lr_0.015")
    assert comparison["second"] == "SAM, lr 0.015"
    as_scipy(found["+90%"], values(slow, 0), values(fast, 0))


def test_an_ensemble_goes_by_its_name(folder):
    members = write(folder, "qtdog", trials=(0, 1))
    for number, result in enumerate(members):
        run = result.card.run
        place = folder / f"ensemble{number}"
        place.mkdir()
        (place / "members.json").touch()
        record = {
            "dataset": run.dataset, "method": run.method, "target": result.card.target,
            "test_envs": list(run.test_envs),
            "trial_seed": run.trial_seed, "settings": settings_of(run), "domains": result.card.domains, "members": 2,
            "combine": "logits", "nbytes": 1, "float_nbytes": 2, "target_accuracy": 0.5,
            **{name: value / 2 for name, value in result.card.accuracies.items()},
        }  # fmt: skip
        write_records(place / "results.jsonl", [record])
    for name in ("eoq", "EoQ"):
        assert main(["compare", str(folder), "--methods", "qtdog", name]) == 0
        comparison, found = read(folder, f"comparison_qtdog_{name}")
        assert (comparison["first"], comparison["second"]) == ("QT-DoG", "EoQ")
        as_scipy(found["+80%"], values(members, 1), values(members, 1) / 2)


def test_data_sets_that_lack_a_method_are_left_out(folder, capsys):
    for method in ("erm", "sam"):
        write(folder, method)
    write(folder, "erm", dataset="RotatedMNIST")
    assert main(["compare", str(folder), "--methods", "erm", "sam"]) == 0
    assert "RotatedMNIST is left out: there is no sam" in capsys.readouterr().out
    read(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "erm"], "--methods takes two, as in `--methods erm qtdog`, not 1"),
        ([], "--methods takes two, as in `--methods erm qtdog`, not 0"),
        (["--methods", "erm", "swad"], "--methods swad: {folder} has ERM; SAM"),
        (
            ["--methods", "erm", "sam", "--confidence", "95"],
            "--confidence must lie between 0 and 1, as .95 does, not 95",
        ),
        (["--methods", "erm", "sam", "--digits", "-1"], "--digits must not be negative"),
    ],
)
def test_mistakes(folder, flags, message, capsys):
    for method in ("erm", "sam"):
        write(folder, method, targets=(0,), trials=(0, 1))
    assert main(["compare", str(folder), *flags]) == 2
    assert message.format(folder=folder) in capsys.readouterr().err


def test_a_method_is_not_compared_with_itself(folder):
    write(folder, "erm")
    with pytest.raises(UserError, match="erm and ERM are the same row, ERM"):
        compare(CompareConfig(str(folder), ["erm", "ERM"]))


def test_no_spread_at_all():
    same = Difference("a", {0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}, 0.95)
    assert same.interval == (0, 0) and same.p_value == 1
    more = replace(same, second={0: 2.0, 1: 3.0})
    assert more.interval == (1, 1) and more.p_value == 0
