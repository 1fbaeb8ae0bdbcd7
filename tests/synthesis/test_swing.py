import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Node
from dfq_jax.graph.ops import Conv2d, MaxPool
from dfq_jax.synthesis.sources.swing import shifted, swing
from dfq_jax.types import InputContract

KEY = jax.random.key(4)
OFFSETS = [(i, j) for i in range(3) for j in range(3)]


@pytest.fixture(scope="module")
def net(nets):
    """Strided convolutions of all sorts: a stem, a block, its shortcut; and an even pooling."""
    b = nets.Builder(InputContract(12, 12), 1)
    x = b.unit("stem", "images", 4, stride=2)
    y = b.unit("block", x, 5, stride=2)
    z = b.bn("shortcut.bn", b.conv("shortcut", x, 5, kernel=1, stride=2))
    x = b.op("relu", nets.Relu(), b.op("add", nets.Add(), y, z))
    x = b.op("pool", MaxPool((3, 3), (3, 3)), b.unit("still", x, 5))
    x = b.op("flat", nets.Flatten(), b.conv("last", x, 6, stride=2))
    return b.done(b.linear("fc", x, 5))


def what_hook_changes(graph, hook, x):
    """{node: its first argument} where the hook of a node gives it another one."""
    found = {}
    for node in graph.nodes:
        slots, args = hook(node, {"kernel": x}, (x, x))
        assert slots == {"kernel": x}
        assert args[1] is x
        if args[0] is not x:
            found[node.name] = args[0]
    return found


def test_windows_of_the_mirrored_image():
    x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
    for reach in (1, 2):
        mirrored = np.pad(x, ((0, 0), (reach,) * 2, (reach,) * 2, (0, 0)), mode="reflect")
        move = jax.jit(lambda x, offset, reach=reach: shifted(x, offset, reach))
        for i, j in np.ndindex(2 * reach + 1, 2 * reach + 1):
            wanted = mirrored[:, i : i + 5, j : j + 4]
            np.testing.assert_array_equal(move(x, jnp.array([i, j])), wanted)


def test_all_nine_convolutions(nets):
    """The middle one is the plain one; inside, the others are those of a moved input."""
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 9, 8, 2)), rng.normal(size=(3, 3, 2, 4))
    plain = lambda v: nets.conv(np.asarray(v, np.float64), kernel, (2, 2), ((1, 1), (1, 1)))
    for i, j in OFFSETS:
        found = plain(shifted(jnp.asarray(x, jnp.float32), jnp.array([i, j]), 1))
        moved = plain(np.roll(x.astype(np.float32), (1 - i, 1 - j), (1, 2)))
        np.testing.assert_allclose(found[:, 1:-1, 1:-1], moved[:, 1:-1, 1:-1], rtol=1e-6)
    x = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(shifted(x, jnp.array([1, 1]), 1), x)


def test_only_strided_convolutions_swing(net, nets):
    x = nets.images(net, 2)
    changed = what_hook_changes(net.graph, swing(4)(KEY, net.graph), x)
    assert set(changed) == {"stem", "block", "shortcut", "last"}
    uneven = Node("uneven", Conv2d((1, 2)), ("images",))
    assert what_hook_changes(net.graph, lambda *a: swing(4)(KEY, net.graph)(uneven, *a[1:]), x)


def test_one_shift_for_the_batch_and_one_for_each_layer(net):
    """A ramp tells where its window was: pixel (3, 3) of the input is 33."""
    ramp = jnp.arange(8.0)[:, None] * 10 + jnp.arange(8.0)
    x = jnp.broadcast_to(ramp[None, :, :, None], (3, 8, 8, 2))

    @jax.jit
    def seen(key):
        changed = what_hook_changes(net.graph, swing()(key, net.graph), x)
        return {name: images[:, 3, 3] for name, images in changed.items()}

    drawn = [seen(jax.random.fold_in(KEY, i)) for i in range(60)]
    places = {name: np.array([np.asarray(d[name]) for d in drawn]) for name in drawn[0]}
    assert len(places) == 4
    for values in places.values():
        assert np.all(values == values[:, :1, :1])
        assert set(values[:, 0, 0]) == {22 + 10 * i + j for i, j in OFFSETS}
    block, shortcut = places["block"][:, 0, 0], places["shortcut"][:, 0, 0]
    assert 0 < np.mean(block == shortcut) < 0.5
    again = seen(jax.random.fold_in(KEY, 7))
    assert all(np.array_equal(again[name], drawn[7][name]) for name in again)


def test_what_cannot_be_mirrored_stays(net):
    for shape in ((2, 1, 8, 3), (2, 8, 1, 3)):
        assert not what_hook_changes(net.graph, swing()(KEY, net.graph), jnp.ones(shape))
    two = jnp.ones((2, 2, 2, 3))
    assert what_hook_changes(net.graph, swing()(KEY, net.graph), two)
    assert not what_hook_changes(net.graph, swing(2)(KEY, net.graph), two)


def test_every_pixel_has_its_turn(nets):
    """A 1x1 convolution of stride 2 alone never looks at three of four pixels."""
    b = nets.Builder(InputContract(6, 6), 2)
    x = b.conv("strided", "images", 3, kernel=1, stride=2, padding=((0, 0), (0, 0)))
    model = b.done(b.linear("fc", b.op("pool", nets.GlobalAvgPool(), x), 5))
    hook_of, x = swing(), nets.images(model, 1)

    def looked(key=None):
        hook = None if key is None else hook_of(key, model.graph)
        loss = lambda x: jnp.sum(evaluate(model, x, hook=hook)[0][0] ** 2)
        return jnp.any(jax.grad(loss)(x) != 0, (0, 3))

    assert int(looked().sum()) == 9
    swung = jax.jit(jax.vmap(looked))(jax.random.split(KEY, 50))
    assert np.asarray(swung).any(0).all()


def test_network_under_swing_sees_other_inputs(net, nets):
    x = nets.images(net, 2)
    plain = nets.run(net, x)
    run = jax.jit(lambda key: evaluate(net, x, hook=swing()(key, net.graph))[0][0])
    for i in range(4):
        swung = run(jax.random.fold_in(KEY, i))
        assert swung.shape == plain.shape
        assert np.abs(np.asarray(swung - plain)).max() > 1e-3


def test_reach_must_be_positive():
    with pytest.raises(ValueError, match=r"swing\(\) needs reach >= 1, got 0"):
        swing(0)
