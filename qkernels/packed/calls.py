"""Call: a function or method that a program may call, what it may be given, and what it takes."""

from collections.abc import Callable, Sequence
from typing import Any

from .by_members import Bound, Form, Operands, in_turn
from .elements import MOST_PARTS, elements_of
from .kinds import ProgramError, shown
from .values import Kind, Result

Rule = Result | Callable[..., Result]


class Call:
    """A function or method, and what it takes.

    Args:
        target: the function, or the name of the method.
        result: what it gives, or a function of the arguments that says so.
        required: how many of the parameters must be given.
        rest: of which kind any number of further arguments may be; they and the last one before are one tuple.
        elements: how many it makes at most, from its arguments; by default as many as the tensors among them have.
        form: how it computes the values of all members at once; by default member by member.
        parameters: name -> kind of each argument, in order.
    """

    def __init__(
        self,
        target: Any,
        result: Rule = "tensor",
        required: int = 1,
        rest: Kind | None = None,
        elements: Callable[..., int] | None = None,
        form: Form | None = None,
        **parameters: Kind,
    ) -> None:
        self.target, self.result, self.required, self.rest, self.parameters = target, result, required, rest, parameters
        self.most_elements = elements or elements_of
        self.form = form

    def check(self, args: list[Any], kwargs: dict[str, Any]) -> Result:
        """Make sure that arguments, with a Known for each Ref, are what it takes; returns what it gives.

        Raises:
            ProgramError: naming the argument that is not.
        """
        names = list(self.parameters)
        given, more = dict(zip(names, args, strict=False)), args[len(names) :]
        if twice := given.keys() & kwargs.keys():
            raise ProgramError(f"is given {min(twice)} twice")
        given |= kwargs
        for name in names[: self.required]:
            if name not in given:
                raise ProgramError(f"is not given {name}")
        for name, value in given.items():
            if name not in self.parameters:
                raise ProgramError(f"has no parameter {shown(name)}")
            if not self.parameters[name].fits(value):
                raise ProgramError(f"takes as {name} {self.parameters[name].name}, not {shown(value)}")
        if more and (self.rest is None or len(more) > MOST_PARTS or not all(map(self.rest.fits, more))):
            raise ProgramError(
                f"takes {self.rest.name if self.rest else 'nothing'} after {names[-1]}, not {shown(more)}"
            )
        return self.result if isinstance(self.result, str) else self.result(**given)

    def bound(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Bound:
        """The arguments by their parameters, which `check` has found to be right."""
        names = list(self.parameters)
        given = dict(zip(names, args, strict=False)) | kwargs
        if more := tuple(args[len(names) :]):
            given[names[-1]] = (given[names[-1]], *more)
        return given

    def run(self, bound: Bound) -> Any:
        """Call it, the required arguments by their places."""
        places = list(self.parameters)[: self.required]
        args = [bound[name] for name in places]
        kwargs = {name: value for name, value in bound.items() if name not in places}
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def of_members(self, args: Sequence[Any], kwargs: dict[str, Any], operands: Operands) -> Any:
        """What it gives of each member's values alone; arguments have Refs, one of them to a value of the members."""
        bound = self.bound(args, kwargs)
        result = None if self.form is None else self.form(self, operands, bound)
        return in_turn(self, operands, bound) if result is None else result
