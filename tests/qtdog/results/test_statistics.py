import math

import pytest
from scipy import stats

from qtdog.results.statistics import Cell, mean_cell, t_quantile, t_within

DEGREES = [1, 2, 3, 4, 5, 6, 9, 10, 29, 30, 999]


@pytest.mark.parametrize("degrees", DEGREES)
def test_students_t_as_scipy(degrees):
    for t in (0, 1e-3, 0.3, 1, 2.5, 10, 100):
        expected = stats.t.cdf(t, degrees) - stats.t.cdf(-t, degrees)
        assert t_within(t, degrees) == pytest.approx(expected, abs=1e-12)
    assert t_within(math.inf, degrees) == pytest.approx(1)
    for confidence in (0.01, 0.5, 0.9, 0.95, 0.99, 0.9999):
        expected = stats.t.ppf((1 + confidence) / 2, degrees)
        assert t_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-9)


def test_students_t_of_a_textbook():
    assert [round(t_quantile(0.95, degrees), 3) for degrees in (1, 2, 3, 30)] == [12.706, 4.303, 3.182, 2.042]


def test_rounding_makes_no_probability_of_more_than_one():
    assert max(t_within(t, degrees) for degrees in range(1, 40) for t in (30, 80, 100, 1e4)) == 1


def test_what_is_no_distribution():
    with pytest.raises(ValueError, match="degrees"):
        t_within(1, 0)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match="confidence"):
            t_quantile(confidence, 2)


def test_summaries_count_trials_that_have_all_columns():
    cells = {"a": Cell({0: 1.0, 1: 5.0}), "b": Cell({0: 3.0, 1: 2.0, 2: 0.0})}
    assert mean_cell(cells, ["a", "b"]) == Cell({0: 2.0, 1: 3.5})
    assert mean_cell(cells, ["a", "b"], min) == Cell({0: 1.0, 1: 2.0})
    assert mean_cell(cells, ["a", "b", "c"]) is None
