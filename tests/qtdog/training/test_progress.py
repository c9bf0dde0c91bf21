from types import SimpleNamespace

from qtdog.log import Log
from qtdog.results.runs import seconds_of
from qtdog.training import progress
from qtdog.training.progress import Progress


def test_off_a_terminal_a_line_at_each_fifth(capsys, monkeypatch):
    now = iter([100.0, 120.0, 160.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with Progress("runs", 100, Log()) as done:
        for steps in (0, 19, 20, 25, 61, 100):
            done(steps)
    assert capsys.readouterr().out.splitlines() == [
        "20 % of the steps in 00:20, about 01:20 left",
        "60 % of the steps in 01:00, about 00:38 left",
    ]


def test_what_a_run_took_counts_training_and_evaluation():
    records = [{"step": 0, "step_time": 1.0, "eval_time": 10.0}, {"step": 4, "step_time": 0.5, "eval_time": 20.0}]
    assert seconds_of(records) == 1 + 10 + 4 * 0.5 + 20


def test_a_log_that_is_not_shown_is_kept(tmp_path, capsys):
    Log(tmp_path / "out.txt", shown=False)("quiet")
    shown = Log(tmp_path / "out.txt")
    shown("loud")
    shown.keep("kept")
    assert capsys.readouterr().out == "loud\n"
    assert (tmp_path / "out.txt").read_text() == "quiet\nloud\nkept\n"
