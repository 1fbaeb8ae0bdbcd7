import math
from typing import Any

import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.graph.ops import Add, BatchNorm, Clip
from dfq_jax.io.importing.builder import Builder


def with_value(op: Any, **values: Any) -> Any:
    """An operator as a file without types would make it."""
    for name, value in values.items():
        object.__setattr__(op, name, value)
    return op


def test_whole_numbers_become_real_ones():
    b = Builder()
    ops: list[Any] = [
        with_value(BatchNorm(), eps=2**60),
        with_value(Clip(), high=6),
        Clip(-1.0, math.inf),
        Add(),
    ]
    for op in ops:
        b.add(op, ("x",))
    found: list[Any] = [n.op for n in b.nodes]
    assert found == [BatchNorm(2.0**60), Clip(None, 6.0), Clip(-1.0, math.inf), Add()]
    assert type(found[0].eps) is float
    assert type(found[1].high) is float


@pytest.mark.parametrize("eps", [1e300, 10**400, math.nan], ids=["float", "int", "nan"])
def test_numbers_beyond_float32_are_refused(eps):
    with pytest.raises(UnsupportedModelError, match="BatchNorm with eps="):
        Builder().add(with_value(BatchNorm(), eps=eps), ("x",))
