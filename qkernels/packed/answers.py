"""What members are called with and what they answer: tensors, or structures of them; and how near answers are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Combine = Callable[[Sequence[Tensor]], Any]


def called(model: nn.Module, inputs: Any) -> Any:
    """A model's answer: a tuple has its arguments, a mapping those with names, and anything else is the only one."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def joined(answers: Sequence[Any]) -> Any:
    """The members' answers as one: [M, ...] where tensors have one shape, in the structure that each has.

    Answers that do not stack, such as the boxes that each has found, are a list.
    """
    first = answers[0]
    if isinstance(first, Tensor):
        same = all(isinstance(answer, Tensor) and answer.shape == first.shape for answer in answers)
        return torch.stack(list(answers)) if same else list(answers)
    if isinstance(first, Mapping) and all(answer.keys() == first.keys() for answer in answers):
        return _like(first, {key: joined([answer[key] for answer in answers]) for key in first})
    if isinstance(first, tuple) and all(len(answer) == len(first) for answer in answers):
        parts = [joined(part) for part in zip(*answers, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)
    return list(answers) if isinstance(first, list) or not _all_equal(answers) else first


def _like(first: Any, parts: dict[str, Any]) -> Any:
    """A mapping of a type that takes its values by name, as Hugging Face's outputs do; else a dict."""
    return parts if type(first) is dict else type(first)(**parts)


def _all_equal(answers: Sequence[Any]) -> bool:
    return all(type(answer) is type(answers[0]) and answer == answers[0] for answer in answers)


def mean_of(answers: Any) -> Any:
    """Of the members' answers: of each tensor [M, ...] of floats in the structure; what is not stays as it is."""
    if isinstance(answers, Tensor):
        return answers.mean(0) if answers.is_floating_point() else answers
    if isinstance(answers, Mapping):
        return _like(answers, {key: mean_of(value) for key, value in answers.items()})
    if isinstance(answers, tuple):
        parts = [mean_of(value) for value in answers]
        return type(answers)(*parts) if hasattr(answers, "_fields") else tuple(parts)
    return answers


def tensors_of(answers: Any) -> list[Tensor]:
    """All tensors of a structure, in order."""
    if isinstance(answers, Tensor):
        return [answers]
    if isinstance(answers, Mapping):
        answers = list(answers.values())
    return [t for part in answers for t in tensors_of(part)] if isinstance(answers, tuple | list) else []


def difference(answers: Any, expected: Any) -> float:
    """The largest of two structures, relative to the largest number in them; infinity where they do not compare."""
    own, others = tensors_of(answers), tensors_of(expected)
    if len(own) != len(others) or any(a.shape != b.shape for a, b in zip(own, others, strict=True)):
        return float("inf")
    return max((_difference(a.double(), b.double()) for a, b in zip(own, others, strict=True)), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs().masked_fill(same, 0.0)
    if not bool(apart.isfinite().all()):
        return float("inf")
    largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.tensor(0.0)
    return float(apart.max() / largest.clamp(min=1e-30)) if apart.numel() else 0.0
