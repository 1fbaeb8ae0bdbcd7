import pytest

from dfq_jax.optim.attempts import RESTARTS, at_lower_rates, rate_of, retold
from dfq_jax.optim.fit import FitResult


def ended(status, steps):
    return FitResult((), (), {}, status, steps, 0.0)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("bad", range(RESTARTS + 2))
def test_attempts_until_one_does_not_diverge(bad, first):
    asked = []

    def attempt(number):
        asked.append(rate_of(number))
        return ended("diverged" if number < bad else "finished", 10 + number)

    made = attempt(0) if first else None
    found, failed = at_lower_rates(attempt, made)
    tries = min(bad, RESTARTS) + 1
    assert asked == [1.0, 0.5, 0.25, 0.125][:tries]
    assert failed == tuple(range(10, 10 + bad))
    assert found == ended("diverged" if bad > RESTARTS else "finished", 9 + tries)


def test_what_is_said_of_failures():
    assert retold(()) == ()
    assert retold((7, 9)) == (
        "diverged at step 7 and was made again at 1/2 of the learning rate",
        "diverged at step 9 and was made again at 1/4 of the learning rate",
    )
