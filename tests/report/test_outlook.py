"""When a run is believed to be over."""

import pytest

from dfq_jax.optim.progress import RunPhase
from dfq_jax.report.outlook import LEAST, Outlook


def test_at_first_it_is_what_was_foreseen():
    found = Outlook(100.0, RunPhase("a", 30.0, 60.0), 100.0)
    assert found.left(100.0) == 90.0
    assert found.left(120.0) == 70.0


def test_a_phase_that_takes_longer_has_a_little_left():
    found = Outlook(0.0, RunPhase("a", 30.0, 60.0), 0.0)
    assert found.left(500.0) == pytest.approx(60.0 + LEAST * 30.0)


def test_the_pace_of_what_is_over_tells_of_the_rest():
    """Twice as slow as foreseen: so is the rest."""
    found = Outlook(0.0, RunPhase("a", 100.0, 50.0), 0.0).next(RunPhase("b", 30.0, 20.0), 200.0)
    assert found.left(200.0) == pytest.approx(2 * 50.0, rel=0.05)
    early = Outlook(0.0, RunPhase("a", 0.1, 50.0), 0.0).next(RunPhase("b", 30.0, 20.0), 1.0)
    assert early.left(1.0) < 1.5 * 50.0  # too little is over to believe that it is ten times slower


def test_steps_tell_how_long_their_phase_takes_without_compiling():
    found = Outlook(0.0, RunPhase("a", 30.0, 0.0), 0.0).moved(0.1, 70.0)
    assert found.moved(0.3, 90.0).left(90.0) == pytest.approx(70.0)
    assert found.moved(0.3, 90.0).left(100.0) == pytest.approx(60.0)
    assert found.moved(1.0, 160.0).left(160.0) == 0.0
    assert found.moved(0.3, 90.0).left(1000.0) == 0.0
