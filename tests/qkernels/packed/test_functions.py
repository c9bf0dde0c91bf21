"""The functions and methods that programs call take their arguments in the places where PyTorch has them."""

import inspect

import pytest
import torch
from torch import Tensor

from qkernels.packed.functions import FUNCTIONS, METHODS
from qkernels.packed.targets import ALIKE, EXTREMES, OPERATORS, canonical

# Their parameters have no names, or others than here.
OTHERWISE = {"getitem", "getattr", "matmul", "mod", "truediv", "floordiv", "einsum", "repeat", "logsigmoid"}


def overloads(name, call):
    """The names of the parameters that may be given by their places, and of those that may not."""
    if inspect.isfunction(call.target) and not hasattr(call.target, "__wrapped__"):
        parameters = list(inspect.signature(call.target).parameters)
        if parameters != ["args", "kwargs"]:  # it chooses between two functions
            return [(parameters, [])]
    return [
        (
            ["input" if a.name == "self" else a.name for a in schema.arguments if not a.kwarg_only],
            [*(a.name for a in schema.arguments if a.kwarg_only), "return_indices"],
        )
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    ]


@pytest.mark.parametrize("name", sorted({*FUNCTIONS, *METHODS} - OTHERWISE))
def test_arguments_have_the_places_of_pytorchs(name):
    call = METHODS.get(name) or FUNCTIONS[name]
    known = overloads(name, call)
    assert known
    for place, key in enumerate(call.parameters):
        places = {by_place.index(key) for by_place, _ in known if key in by_place}
        assert place in places or (not places and any(key in by_name for _, by_name in known)), (key, known)


def test_what_is_found_by_name_means_the_same():
    """Tensor.unfold is no F.unfold, and torch.batch_norm has other places than F.batch_norm."""
    for name, call in FUNCTIONS.items():
        for owner in (torch, Tensor):
            other = getattr(owner, name, call.target)
            if other is call.target or name in METHODS or name in OPERATORS or name in EXTREMES:
                continue
            found = canonical(other, name, (torch.ones(2, 2),) * 3, {}).target
            assert (found is call.target) == (name in ALIKE or name == "where"), f"{owner.__name__}.{name}"
