import jax
import pytest

from dfq_jax.optim.out_of_memory import exhausted, sparing

FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


def needing(enough, error=FULL):
    """Adds one to the state in any way of at least `enough`; consumes the state."""

    def advance(way, state):
        number = state.pop()
        if way < enough:
            raise error
        return [number + 1]

    return advance


@pytest.mark.parametrize("error", [FULL, MemoryError("of the host")])
def test_the_next_way_is_kept(error):
    asked = []

    def lighter():
        asked.append(2 ** (len(asked) + 1))
        return asked[-1]

    step = sparing(needing(4, error), 1, lighter)
    assert (step([0], lambda: [0]), step([1], list)) == ([1], [2])
    assert asked == [2, 4]


def test_giving_up():
    def lighter():
        raise ValueError("no lighter way")

    with pytest.raises(ValueError, match="no lighter way") as caught:
        sparing(needing(4), 1, lighter)([0], list)
    assert caught.value.__context__ is None
    with pytest.raises(jax.errors.JaxRuntimeError):
        sparing(needing(4), 1, None)([0], list)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        sparing(needing(4, jax.errors.JaxRuntimeError("INTERNAL: a bug")), 1, lighter)([0], list)


def test_what_counts():
    assert exhausted(FULL)
    assert exhausted(MemoryError())
    assert not exhausted(jax.errors.JaxRuntimeError("INVALID_ARGUMENT"))
