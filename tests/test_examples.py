"""The notebooks in examples/: their cells run, in order, and what they show was shown by an undisturbed run."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_with_few_steps(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    source, shortened = re.subn(r"^STEPS = \d+$", "STEPS = 10", source, flags=re.MULTILINE)
    assert shortened == 1
    exec(compile(source, notebook.name, "exec"), {"__name__": "__main__"})
    # What it prints are the same lines as those in the file, but for their numbers.
    printed = [re.sub(r"[-+\d.,%e ]+", "#", line) for line in capsys.readouterr().out.splitlines()]
    kept = [re.sub(r"[-+\d.,%e ]+", "#", line) for cell in code_cells(notebook) for line in printed_by(cell)]
    assert printed == kept


def printed_by(cell):
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream").splitlines()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_clean_run(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert not re.search(r"/(home|root|tmp|work|usr)\b", notebook.read_text())


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2
