import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import DataError, UsageError
from dfq_jax.optim.fit import start_state
from dfq_jax.optim.state import NOWHERE, Place, StateStore
from dfq_jax.optim.steps import descent
from dfq_jax.values import bound

STATE = {"x": jnp.arange(3.0), "step": jnp.array(7, jnp.int32), "nested": (jnp.ones((2, 2)), ())}
BLANK = {"x": jnp.zeros(3), "step": jnp.array(0, jnp.int32), "nested": (jnp.zeros((2, 2)), ())}


def same(a, b):
    np.testing.assert_array_equal(a["x"], b["x"])
    np.testing.assert_array_equal(a["nested"][0], b["nested"][0])
    assert int(a["step"]) == int(b["step"])
    assert a["step"].dtype == np.int32


def test_saves_and_loads(tmp_path):
    store = StateStore(tmp_path / "new" / "run", {"seed": 1})
    assert store.steps() == []
    assert store.load(BLANK) is BLANK
    store.save(7, STATE, force=True)
    same(StateStore(tmp_path / "new" / "run", {"seed": 1}).load(BLANK), STATE)


def test_keeps_only_the_latest(tmp_path):
    store = StateStore(tmp_path, {}, every_seconds=0.0)
    for step in (9, 10, 100):
        store.save(step, {**STATE, "step": jnp.array(step, jnp.int32)})
    assert store.steps() == [100]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fingerprint.json", "step_100"]
    assert int(store.load(BLANK)["step"]) == 100


def test_saves_no_more_often_than_asked(tmp_path):
    store = StateStore(tmp_path, {}, every_seconds=1e6)
    store.save(1, STATE)
    assert store.steps() == []
    store.save(2, STATE, force=True)
    store.save(3, STATE)
    assert store.steps() == [2]
    store.save(2, BLANK, force=True)  # that step is safe already
    same(store.load(BLANK), STATE)


def test_loads_the_latest_when_a_kill_left_two(tmp_path):
    store = StateStore(tmp_path, {}, every_seconds=0.0)
    store.save(9, STATE)
    (tmp_path / "step_9").rename(tmp_path / "kept")
    store.save(10, {**STATE, "x": jnp.full(3, 5.0)})
    (tmp_path / "kept").rename(tmp_path / "step_9")
    assert store.steps() == [9, 10]
    assert store.load(BLANK)["x"].tolist() == [5, 5, 5]


def test_survives_half_a_save(tmp_path):
    store = StateStore(tmp_path, {}, every_seconds=0.0)
    store.save(3, STATE)
    left = tmp_path / "step_4.orbax-checkpoint-tmp-123"
    left.mkdir()
    (left / "half").write_bytes(b"\0")
    again = StateStore(tmp_path, {}, every_seconds=0.0)
    assert again.steps() == [3]
    same(again.load(BLANK), STATE)
    again.save(4, {**STATE, "step": jnp.array(4, jnp.int32)})
    assert int(again.load(BLANK)["step"]) == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_damaged_states_are_passed_over_for_older_ones_or_none(damage, tmp_path):
    store = StateStore(tmp_path, {}, every_seconds=0.0)
    store.save(9, STATE)
    shutil.copytree(tmp_path / "step_9", tmp_path / "kept")
    store.save(10, {**STATE, "x": jnp.full(3, 5.0)})
    (tmp_path / "kept").rename(tmp_path / "step_9")
    for step in (10, 9):
        for file in (p for p in (tmp_path / f"step_{step}").rglob("*") if p.is_file()):
            data = bytearray(file.read_bytes())
            if damage == "flipped":
                data[len(data) // 2 :] = bytes(b ^ 0x55 for b in data[len(data) // 2 :])
            if damage == "gone":
                file.unlink()
            else:
                file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
        found = StateStore(tmp_path, {}).load(BLANK)
        if step == 10:
            same(found, STATE)
        else:
            assert found is BLANK
    assert store.steps() == []
    store.save(11, STATE, force=True)
    same(store.load(BLANK), STATE)


@pytest.mark.parametrize("data", [b"", b'{"seed": 1', b"[1]", b"\xff\xfe"])
def test_a_damaged_fingerprint_is_told(data, tmp_path):
    StateStore(tmp_path, {"seed": 1})
    (tmp_path / "fingerprint.json").write_bytes(data)
    with pytest.raises(DataError, match=rf"fingerprint\.json is damaged.*Delete {tmp_path}"):
        StateStore(tmp_path, {"seed": 1})
    assert (tmp_path / "fingerprint.json").read_bytes() == data


def test_differences_inside_fields_are_named_and_counted(tmp_path):
    bits = {f"conv{i}": 4 for i in range(12)}
    StateStore(tmp_path, {"bits": bits, "seed": 1})
    with pytest.raises(UsageError) as caught:
        StateStore(tmp_path, {"bits": {**bits, "conv3": 8}, "seed": 1})
    assert "run:\n  bits: conv3: saved 4, now 8\nFinish" in str(caught.value)
    with pytest.raises(UsageError, match=r"conv0: saved 4, now 2\n(?s:.*)\n  and 5 more\nFinish"):
        StateStore(tmp_path, {"bits": dict.fromkeys(bits, 2), "seed": 2})


def test_a_kill_leaves_no_half_fingerprint(tmp_path, monkeypatch):
    """Which no later run could read."""

    def power_cut(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            StateStore(tmp_path, {"seed": 1})
    assert list(tmp_path.iterdir()) == []
    StateStore(tmp_path, {"seed": 1})


def test_refuses_another_run_and_names_the_fields(tmp_path):
    StateStore(tmp_path, {"seed": 1, "steps": 500, "weights": "ab", "size": (8, 8)})
    StateStore(tmp_path, {"seed": 1, "steps": 500, "weights": "ab", "size": [8, 8]})
    message = (
        f"{re.escape(str(tmp_path))} holds the state of a different run:\n"
        r"  batch: saved None, now 4\n  seed: saved 1, now 2\n  steps: saved 500, now None\n"
        r"Finish that run .* delete the folder"
    )
    with pytest.raises(UsageError, match=message):
        StateStore(tmp_path, {"seed": 2, "weights": "ab", "size": (8, 8), "batch": 4})
    assert json.loads((tmp_path / "fingerprint.json").read_text())["seed"] == 1


def test_start_state_copies(tmp_path):
    import optax

    x = {"a": jnp.ones(2)}
    state = start_state(x, (), descent(lambda x, *_: (x["a"], ({}, ())), bound(optax.adam, 0.1)))
    assert state.x["a"] is not x["a"]
    store = StateStore(tmp_path, {})
    store.save(0, state, force=True)
    loaded = store.load(state)
    assert type(loaded) is type(state)
    assert float(loaded.best) == np.inf


def test_a_place_inside_another(tmp_path):
    """For a part of a run: in a folder of its own, dependent on the same and more."""
    whole = Place(tmp_path, {"seed": 1})
    part = (whole / "unit-0").knowing({"method": "m"})
    assert part == Place(tmp_path / "unit-0", {"seed": 1, "method": "m"})
    assert whole.facts == {"seed": 1}
    store = part.store()
    assert store is not None
    assert store.folder == tmp_path / "unit-0"
    with pytest.raises(UsageError, match="method: saved 'm', now 'other'"):
        part.knowing({"method": "other"}).store()
    with part.owned(), pytest.raises(UsageError, match="is being written"), part.owned():
        pass
    part.remove()
    assert not (tmp_path / "unit-0").exists()
    part.remove()


def test_nowhere_is_nowhere_throughout():
    inside = (NOWHERE / "a").knowing({"seed": 1})
    assert inside.folder is None
    assert inside.store() is None
    with inside.owned(), inside.owned():
        inside.remove()
