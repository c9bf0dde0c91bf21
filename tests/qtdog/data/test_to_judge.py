"""Pictures to judge a trained model on: fewer will do than training needs, and what will not is told."""

import pytest

from qtdog.data.benchmarks import BENCHMARKS
from qtdog.data.to_judge import files_to_judge
from qtdog.errors import UserError
from tiny import make_pictures


def quiet(line):
    pass


def test_domainbeds_sets_have_their_own_layouts(tmp_path):
    classes = BENCHMARKS["PACS"].classes
    for domain in BENCHMARKS["PACS"].images:
        for label in classes:
            (tmp_path / "PACS" / domain / label).mkdir(parents=True)
            (tmp_path / "PACS" / domain / label / "1.jpg").write_bytes(b"not opened")
    found = files_to_judge("PACS", str(tmp_path), classes, quiet)
    assert found.classes == classes and list(found.files) == list(BENCHMARKS["PACS"].images)
    one = str(tmp_path / "PACS" / "sketch")
    with pytest.raises(UserError, match="other pictures of these classes, or some of them: --dataset folder"):
        files_to_judge("PACS", one, classes, quiet)
    found = files_to_judge("folder", one, classes, quiet)
    assert list(found.files) == ["sketch"] and all(len(found.files["sketch"][label]) == 1 for label in classes)


@pytest.mark.parametrize(
    ("name", "told"), [("Icons", "there is no data set of pictures Icons"), ("folder", "dark/red, middle/red")]
)
def test_what_cannot_be_judged_on(tmp_path, name, told):
    root = make_pictures(tmp_path / "tints", count=1)
    with pytest.raises(UserError) as error:
        files_to_judge(name, str(root), ["blue", "green"], quiet)
    assert told in str(error.value)
