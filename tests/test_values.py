import dataclasses
import enum
import json
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UsageError
from dfq_jax.values import bound, described, fingerprint, name_of


def scaled(factor, x, shift=0.0):
    return factor * x + shift


def other(factor, x):
    return factor - x


class Colour(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    first: Any
    second: Any = 2


@dataclasses.dataclass(frozen=True)
class Record:
    name: str
    data: Any
    seen: int = dataclasses.field(default=0, compare=False)


def test_a_bound_function_is_called_with_the_rest():
    assert bound(scaled, 2, shift=1.0)(3) == 7
    assert bound(scaled, 2, shift=1.0)(3, shift=2.0) == 8
    assert bound(bound(scaled, 2), shift=1.0)(3) == 7
    assert repr(bound(scaled, 2, shift=1.0)) == "bound(scaled, 2, shift=1.0)"
    found = jax.jit(jax.value_and_grad(bound(scaled, 3.0)))(2.0)
    assert [float(v) for v in found] == [6.0, 3.0]


@dataclasses.dataclass(frozen=True)
class Nothing:
    pass


VALUES = [
    bound(scaled, 2),
    bound(scaled, 2.0),
    bound(scaled, True),
    bound(scaled, 3),
    bound(scaled, "2"),
    bound(scaled, factor=2),
    bound(scaled, -0.0),
    bound(scaled, 0.0),
    bound(scaled, math.nan),
    bound(scaled, (1, 2)),
    bound(scaled, [1, 2]),
    bound(scaled, (1, (2,))),
    bound(other, 2),
    bound(scaled, scaled),
    bound(scaled, other),
    bound(scaled, bound(scaled, 2)),
    bound(scaled, Pair(1)),
    bound(scaled, Pair(1, 3)),
    bound(scaled, Record("a", 1)),
    bound(scaled, {"a": 1}),
    bound(scaled, {1: "a"}),
    bound(scaled, Colour.RED),
    bound(scaled, b"12"),
    bound(scaled, np.float32(2)),
    bound(scaled, np.arange(4)),
    bound(scaled, np.arange(4).reshape(2, 2)),
    bound(scaled, np.arange(4, dtype=np.float32)),
    bound(scaled, jax.random.key(1)),
    bound(scaled, frozenset({1, 2})),
    bound(scaled, Record),
    bound(scaled, Nothing),
    bound(scaled, Nothing()),
    bound(scaled, jnp.float32),
]


def copied(value):
    """An equal value that shares nothing with it."""
    match value:
        case np.ndarray():
            return value.copy()
        case tuple() if not hasattr(value, "_fields"):
            return tuple(copied(v) for v in value)
        case dict():
            return {k: copied(v) for k, v in value.items()}
        case _:
            return value


def test_equal_where_function_and_arguments_are():
    for i, one in enumerate(VALUES):
        again = bound(one.function, *copied(one.args), **dict(one.kwargs))
        assert (again, hash(again), fingerprint(again)) == (one, hash(one), fingerprint(one))
        for later in VALUES[i + 1 :]:
            assert one != later, (one, later)
            assert fingerprint(one) != fingerprint(later), (one, later)


def test_arrays_are_told_by_what_they_hold_wherever_they_lie():
    assert bound(scaled, np.arange(3, dtype=np.int32)) == bound(scaled, jnp.arange(3))
    assert bound(scaled, np.asfortranarray(np.eye(3) + 1)) == bound(scaled, np.eye(3) + 1)


def test_what_has_no_name_is_equal_to_itself_alone():
    nameless = lambda x: x
    assert bound(scaled, nameless) == bound(scaled, nameless)
    assert hash(bound(nameless)) == hash(bound(nameless))
    assert bound(scaled, nameless) != bound(scaled, lambda x: x)


def test_a_description_is_plain_data():
    value = Pair(bound(scaled, 2, shift=math.inf), Record("a", (1, 2.5, None), seen=7))
    found = described(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["is"] == [{"is": f"{__name__}:Pair"}]
    wanted = {"is": f"{__name__}:scaled", "0": 2, "shift": {"float": "inf"}}
    assert found["first"] == wanted
    assert {**found["second"], "is": ...} == {"is": ..., "name": "a", "data": [1, 2.5, None]}


def test_partial_is_told_like_a_bound_function():
    assert described(partial(scaled, 2)) == described(bound(scaled, 2))


def closure(x):
    def inner():
        return x

    return inner


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Pair(1, lambda x: x), r"^recipe\.second is <lambda>, which has no name"),
        (
            Pair(bound(scaled, (1, closure(2)))),
            r"^recipe\.first\.0\[1\] is closure\.<locals>\.inner,",
        ),
        (
            {"a": Record("b", [].append)},
            r"^recipe\.a\.data is list\.append, .* at the top of a module",
        ),
        (
            Pair(object()),
            r"^recipe\.first is a object, .*dfq_jax\.values\.bound\(function, \.\.\.\)",
        ),
    ],
)
def test_what_cannot_be_named_is_refused_with_its_place(value, message):
    with pytest.raises(UsageError, match=message):
        described(value, "recipe")


def test_names_are_those_by_which_functions_are_found():
    assert name_of(scaled) == f"{__name__}:scaled"
    assert name_of(jax.nn.relu) is not None
    assert name_of(closure(1)) is None
    assert name_of(3) is None


def test_equal_functions_share_a_compiled_program():
    traces = []

    def run(function, x):
        traces.append(1)
        return function(x)

    compiled = jax.jit(run, static_argnames="function")
    compiled(bound(scaled, 2.0), 1.0)
    compiled(bound(scaled, 2.0), 3.0)
    assert len(traces) == 1
    compiled(bound(scaled, 2), 3.0)
    assert len(traces) == 2
