import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from dfq_jax.base.parallel import (
    Machine,
    at_home,
    automatic,
    data_mesh,
    everywhere,
    no_mesh,
    on_every_device,
    remembered,
    settled,
    share_rows,
    stack,
    unstack,
)
from dfq_jax.errors import UsageError
from dfq_jax.recipes.best import best
from dfq_jax.synthesis.run.engine import synthesize_images

KEY = jax.random.key(2)


def explicit(devices=4):
    mesh = data_mesh(devices)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,))


def test_a_mesh_of_this_process():
    mesh = data_mesh(3)
    assert (mesh.axis_names, mesh.size, mesh.axis_types) == (("data",), 3, (AxisType.Auto,))
    assert mesh.devices.tolist() == jax.local_devices()[:3]
    assert automatic(explicit()) == data_mesh(4)


@pytest.mark.parametrize(
    ("devices", "told"),
    [
        (0, "one device at least, got 0"),
        (-1, "one device at least, got -1"),
        (9, r"asked for 9 devices, this process has 8 of platform cpu\. .*num_cpu_devices"),
    ],
)
def test_devices_that_are_not_there(devices, told):
    with pytest.raises(UsageError, match=told):
        data_mesh(devices)


@jax.jit
def program(state, fixed, key):
    """Randomness, constants, a loop, and a derivative: what optimisations are made of."""
    noise = jax.random.normal(key, state["x"].shape)
    value = lambda x: jnp.sum(jnp.tanh(x * fixed + noise) ** 2) + state["y"]
    move = lambda x, _: (x - 0.1 * jax.grad(value)(x) * np.ones(3, np.float32), value(x))
    x, losses = jax.lax.scan(move, state["x"], length=5)
    return {"x": x, "y": losses[-1]}, losses


STATES = [{"x": jnp.linspace(i, i + 1, 3), "y": jnp.float32(i)} for i in range(4)]
FIXED = jnp.array([0.5, 2.0, -1.0])
KEYS = [jax.random.fold_in(KEY, i) for i in range(4)]


def test_side_by_side_does_what_each_device_would_do_alone():
    mesh = data_mesh(4)
    many = jax.jit(on_every_device(program, mesh, (True, False, True)))
    given = (stack(STATES, mesh), everywhere(FIXED, mesh), stack(KEYS, mesh))
    found = unstack(many(*given))
    for i, (state, losses) in enumerate(found):
        wanted = program(STATES[i], FIXED, KEYS[i])
        for a, b in zip(jax.tree.leaves((state, losses)), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.sharding == b.sharding
    assert len({float(state["y"]) for state, _ in found}) == 4
    text = many.lower(*given).compile().as_text()
    assert text is not None
    assert not re.search("all-|collective|reduce-scatter", text)
    assert many(*given)[1].sharding.spec == P("data")


def test_stacks_lie_one_entry_a_device():
    mesh = data_mesh(4)
    tree = stack(STATES, mesh)
    assert tree["x"].shape == (4, 3)
    for i, shard in enumerate(tree["x"].addressable_shards):
        assert shard.device == mesh.devices[i]
        np.testing.assert_array_equal(shard.data[0], STATES[i]["x"])
    assert stack(KEYS, mesh).dtype == KEY.dtype
    assert stack([(), ()], data_mesh(2)) == ()
    assert unstack(tree)[2]["x"].devices() == {jax.local_devices()[0]}


def test_what_is_remembered_comes_back_where_it_was():
    mesh = data_mesh(4)
    rows = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    one, all_of_it = jnp.float32(3), jax.device_put(jnp.arange(3), NamedSharding(mesh, P()))
    tree = {"rows": rows, "one": one, "all": all_of_it}
    wanted, places = jax.tree.map(np.array, tree), {k: v.sharding for k, v in tree.items()}
    again = remembered(tree)
    for v in tree.values():
        v.delete()
    for _ in range(2):
        found = again()
        assert {k: v.sharding for k, v in found.items()} == places
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("kind", [data_mesh, explicit])
def test_rows_are_shared_and_the_rest_is_everywhere(kind):
    mesh = kind(4)
    tree = {"rows": jnp.arange(24.0).reshape(8, 3), "weights": jnp.ones((3, 8)), "n": jnp.ones(())}
    placed = share_rows(tree, 8, mesh)
    assert placed["rows"].sharding == NamedSharding(data_mesh(4), P("data"))
    assert placed["weights"].sharding == placed["n"].sharding == NamedSharding(data_mesh(4), P())
    jax.tree.map(np.testing.assert_array_equal, placed, tree)


def test_arrays_come_home():
    mesh = data_mesh(2)
    tree = (everywhere(jnp.arange(3.0), mesh), stack([KEY, KEY], mesh), np.ones(2), jnp.ones(1))
    home = at_home(tree)
    assert all(v.devices() == {jax.devices()[0]} for v in (home[0], home[1], home[3]))
    assert home[0].tolist() == [0, 1, 2]
    assert jax.random.key_data(home[1]).tolist() == [jax.random.key_data(KEY).tolist()] * 2
    assert home[2] is tree[2]
    assert home[3] is tree[3]


@pytest.mark.parametrize("kind", [data_mesh, explicit])
def test_a_tree_settles_on_one_mesh(kind):
    plain = {"x": jnp.ones(4), "step": jnp.zeros(()), "none": None}
    assert settled(plain) is plain
    rows = jax.device_put(jnp.arange(4.0), NamedSharding(kind(4), P("data")))
    mixed = settled({"x": rows, "step": jnp.zeros(()), "key": KEY, "number": 3.5})
    assert mixed["x"].sharding == NamedSharding(data_mesh(4), P("data"))
    assert mixed["x"].tolist() == [0, 1, 2, 3]
    assert mixed["step"].sharding == NamedSharding(data_mesh(4), P())
    assert mixed["key"].sharding == NamedSharding(data_mesh(4), P())
    assert mixed["number"] == 3.5


def test_the_mesh_of_the_caller_is_set_aside_and_comes_back():
    with jax.set_mesh(explicit()):
        with no_mesh():
            assert isinstance((jnp.arange(4) + 1).sharding, SingleDeviceSharding)
        assert isinstance((jnp.arange(4) + 1).sharding, NamedSharding)


def test_optimised_programs_give_the_same_bits_on_one_and_on_many_devices(tiny_net):
    """Other tests of synthesis leave programs unoptimised; here fusion could tell them apart."""
    recipe = best(steps=8, batch=4)
    one = synthesize_images(tiny_net, recipe, 8, KEY, chunk=4)
    two = synthesize_images(tiny_net, recipe, 8, KEY, chunk=4, machine=Machine(2))
    np.testing.assert_array_equal(one.images, two.images)
    assert one.losses == two.losses
    assert one.losses[0] != one.losses[1]
