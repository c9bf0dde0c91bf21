"""Diverse networks go through all that `benchmarks.zoo` asks of each; its page is that of the committed rows."""

import pytest

from benchmarks.zoo import page
from benchmarks.zoo.judging import Row, judge, judge_all

IN_ONE_GRAPH = [
    "test_resnet",
    "test_efficientnet",
    "test_efficientnet_evos",  # EvoNorm
    "test_efficientnet_gn",  # GroupNorm and activation
    "test_byobnet",
    "test_nfnet",  # standardized weights
    "test_convnext",
    "test_mambaout",
    "test_vit",
    "test_vit_relpos",
    "test_coatnet",
    "mobilenetv3_small_050",
    "torchvision/squeezenet1_1",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_ONE_GRAPH)
def test_a_network_trains_packs_loads_and_answers(name, tmp_path):
    row = judge(name, tmp_path)
    assert row.fine and row.in_turn is None and row.integers is not None, row


def test_a_network_that_fails_is_a_row_with_the_reason():
    (row,) = judge_all(["no_such_network"], jobs=1)
    assert not row.fine and "no_such_network" in row.error


def test_the_page_is_that_of_the_committed_rows():
    assert page.PAGE.read_text() == page.page()


def test_every_committed_network_trains_and_answers_right():
    """What differs without a word would stand here as a difference; what is refused, as an error with its reason."""
    rows = page.read_rows().values()
    assert len(rows) > 130 and all(row.trains for row in rows)
    assert sum(row.packs for row in rows) >= 0.95 * len(rows)


def test_a_line_says_why_in_turn_and_why_not():
    assert "| in turn: it asks for x\\|y &lt;" in page.line(Row("a", in_turn="it asks for x|y <"))
    assert "| **failed**: ValueError: no |" in page.line(Row("a", error="ValueError: no"))
