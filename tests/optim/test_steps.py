from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.optim.fit import fit
from dfq_jax.optim.state import StateStore
from dfq_jax.optim.steps import Player, descent, in_turn
from dfq_jax.values import bound

KEY = jax.random.key(4)
TIMES = 3
START = {"fox": jnp.array([2.0, -1.0]), "hare": jnp.array([-1.0, 0.5])}
MEMORY = {"fox": (), "hare": jnp.zeros((), jnp.int32)}


def chase(x, among, now):
    """The fox goes where the hare is."""
    noise = jax.random.normal(now.key, x.shape)
    gap = jnp.sum((x - among.others["hare"]) ** 2)
    return gap + among.context * jnp.sum(noise * x), ({"gap": gap}, ())


def flee(x, among, now):
    """The hare goes where the fox is not, and not far; counts its steps."""
    gap = jnp.sum((x - among.others["fox"]) ** 2)
    return jnp.sum(x**2) - 0.5 * gap, ({"gap": gap, "step": now.step}, now.memory + 1)


def players(times: int = TIMES, rate: float = 0.1):
    fox = Player("fox", descent(chase, bound(optax.sgd, rate, momentum=0.5)))
    return fox, Player("hare", descent(flee, bound(optax.adam, 0.05)), times)


def game(times: int = TIMES, rate: float = 0.1):
    return in_turn(*players(times, rate))


def play(steps: int = 6, noise: float = 0.1, step: Any = None, **how: Any):
    given = (game() if step is None else step, START, jnp.float32(noise))
    return fit(*given, steps=steps, key=KEY, memory=MEMORY, **how)


def test_players_take_turns_as_in_a_plain_loop():
    found = play(steps=5, noise=0.0, chunk=1)
    x = {name: np.asarray(value, np.float64) for name, value in START.items()}
    speed, first, second, gaps, count = np.zeros(2), np.zeros(2), np.zeros(2), [], 0
    for _ in range(5):
        gaps.append(np.sum((x["fox"] - x["hare"]) ** 2))
        speed = 0.5 * speed + 2 * (x["fox"] - x["hare"])
        x["fox"] = x["fox"] - 0.1 * speed
        for _ in range(TIMES):
            slope, count = 2 * x["hare"] - (x["hare"] - x["fox"]), count + 1
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
            mean, square = first / (1 - 0.9**count), second / (1 - 0.999**count)
            x["hare"] = x["hare"] - 0.05 * mean / (np.sqrt(square) + 1e-8)
    for name, value in x.items():
        np.testing.assert_allclose(found.x[name], value, rtol=1e-4)
    assert int(found.memory["hare"]) == 5 * TIMES
    assert set(found.history) == {"loss", *(f"fox/{p}" for p in ("loss", "gap"))} | {
        f"hare/{p}" for p in ("loss", "gap", "step")
    }
    np.testing.assert_allclose(found.history["fox/gap"], gaps, rtol=1e-4)
    assert found.history["hare/step"].tolist() == [TIMES * n + TIMES - 1 for n in range(5)]
    total = found.history["fox/loss"] + found.history["hare/loss"]
    np.testing.assert_allclose(found.history["loss"], total, rtol=1e-6)


def test_a_player_may_begin_later():
    """Until then it stands still, as its optimizer does; it hears and remembers all the same."""
    fox, hare = players()
    late = in_turn(fox, hare._replace(after=2))
    waited = play(steps=2, noise=0.0, step=late)
    np.testing.assert_array_equal(waited.x["hare"], START["hare"])
    assert int(waited.memory["hare"]) == 2 * TIMES
    assert not np.array_equal(waited.x["fox"], START["fox"])
    moved = play(steps=3, noise=0.0, step=late)
    alone = (game(), {**START, "fox": waited.x["fox"]}, jnp.float32(0.0))
    begun = fit(*alone, steps=1, key=KEY, memory=MEMORY)
    assert not np.array_equal(moved.x["hare"], START["hare"])
    assert np.abs(np.asarray(moved.x["hare"] - begun.x["hare"])).max() < 0.05


def test_a_game_that_was_stopped_goes_on_bit_for_bit(tmp_path):
    def stop(step, metrics):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(chunk=2, on_chunk=stop, store=StateStore(tmp_path, {}))
    resumed, whole = play(chunk=2, store=StateStore(tmp_path, {})), play(chunk=2)
    for a, b in zip(*(jax.tree.leaves((r.x, r.memory)) for r in (resumed, whole)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.history["loss"].shape == (4,)
    assert not np.array_equal(whole.x["fox"], play(noise=0.0).x["fox"])  # it draws randomness


def test_equal_games_are_equal_values():
    assert game() == game()
    assert hash(game()) == hash(game())
    assert game() != game(times=2)
    assert game() != game(rate=0.2)


def test_all_stand_still_where_one_diverges():
    found = play(steps=40, step=game(rate=1e30))
    assert found.status == "diverged"
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(found.x))


@pytest.mark.parametrize("times", [(1, 0), (1, 1)])
def test_players_need_names_and_turns(times):
    step = descent(chase, bound(optax.sgd, 0.1))
    names = ("fox", "hare") if 0 in times else ("fox", "fox")
    with pytest.raises(
        ValueError, match=r"differ, times >= 1 and after >= 0, got \[\('fox', 1, 0\)"
    ):
        in_turn(*(Player(n, step, t) for n, t in zip(names, times, strict=True)))
