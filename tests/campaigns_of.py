"""What the campaigns share: a few cases of each by day, all of them by night."""

from typing import Any

import pytest


def cases(few: Any, all_of_them: Any, name: str = "count") -> pytest.MarkDecorator:
    """The parameter `count`: a few, among the slow tests, and all, by night."""
    return pytest.mark.parametrize(
        name, [pytest.param(few, marks=pytest.mark.slow), pytest.param(all_of_them, marks=pytest.mark.nightly)]
    )
