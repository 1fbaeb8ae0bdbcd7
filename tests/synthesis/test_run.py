import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.errors import DivergedError, UnsupportedModelError, UsageError
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.graph.query import classes_of
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.schedules import reduce_on_plateau
from dfq_jax.optim.state import Place
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.recipes.best import best
from dfq_jax.synthesis.recipe import Recipe, Source, Stage, batch_size
from dfq_jax.synthesis.run.engine import suited, synthesize_images
from dfq_jax.synthesis.sources.pixels import from_natural, gaussian
from dfq_jax.synthesis.terms.base import Term, image_statistics
from dfq_jax.synthesis.terms.match import batch_norm_match
from dfq_jax.types import InputContract

KEY = jax.random.key(5)


def plateau(factor):
    return optax.chain(optax.adam(0.1 * factor), reduce_on_plateau(factor=0.5, patience=1))


def recipe(steps=6, optimizer=plateau, **changes):
    base = Recipe(
        name="small",
        settings={},
        batch=2,
        source=Source(gaussian),
        stages=(Stage(steps, optimizer),),
        terms=(Term("bn", 1.0, batch_norm_match), Term("image", 0.5, image_statistics)),
    )
    return base._replace(**changes)


def crash_at(batch, step, error):
    """A progress callback that fails once the run gets there."""

    def on_progress(p):
        if (p.batch, p.step) == (batch, step):
            raise error

    return on_progress


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


@pytest.fixture(scope="module")
def whole(net):
    """Five images in batches of two, never interrupted."""
    return synthesize_images(net, recipe(), 5, KEY, chunk=2)


def same(a, b):
    np.testing.assert_array_equal(a.images, b.images)
    assert a.losses == b.losses


def test_as_many_images_as_asked_for(whole, net):
    assert whole.images.shape == (5, 6, 6, 3)
    assert len(whole.losses) == 3
    assert whole.excluded == ()
    pairs = itertools.combinations(np.asarray(whole.images), 2)
    assert all(np.abs(a - b).max() > 0.1 for a, b in pairs)


def test_equal_keys_give_equal_images(whole, net):
    fewer = synthesize_images(net, recipe(), 3, KEY, chunk=2)
    np.testing.assert_array_equal(fewer.images, whole.images[:3])
    assert fewer.losses == whole.losses[:2]
    other = synthesize_images(net, recipe(), 2, jax.random.key(6), chunk=2)
    assert not np.allclose(other.images, fewer.images[:2])


def test_losses_are_those_of_the_last_step(net):
    """With a frozen optimizer every step has the loss of the start."""
    still = recipe(optimizer=lambda factor: optax.sgd(0.0))
    found = synthesize_images(net, still, 2, KEY)
    moved = synthesize_images(net, recipe(steps=30), 2, KEY)
    init_key = jax.random.split(jax.random.fold_in(KEY, 0), 3)[0]
    np.testing.assert_array_equal(found.images, gaussian(init_key, (2, 6, 6, 3)))
    assert moved.losses[0] < found.losses[0]


def test_one_program_for_all_batches_and_chunks(net):
    traces = []

    def counted(o):
        traces.append(1)
        return batch_norm_match(o)

    one = recipe(terms=(Term("bn", 1.0, counted),))
    synthesize_images(net, one, 2, KEY, chunk=6)
    once = len(traces)
    synthesize_images(net, one, 6, KEY, chunk=2)
    assert len(traces) == 2 * once


def test_progress(net):
    seen = []
    synthesize_images(net, recipe(), 3, KEY, chunk=3, watch=Watcher(progress=seen.append))
    assert [(p.batch, p.batches, p.step, p.steps) for p in seen] == [
        (0, 2, 3, 6),
        (0, 2, 6, 6),
        (1, 2, 3, 6),
        (1, 2, 6, 6),
    ]
    for p in seen:
        assert set(p.parts) == {"loss", "bn", "image"}
        total = p.parts["bn"] + 0.5 * p.parts["image"]
        assert p.parts["loss"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(("batch", "step"), [(1, 4), (2, 6)], ids=lambda v: str(v))
def test_resumes_bit_for_bit(batch, step, whole, net, tmp_path):
    stop = crash_at(batch, step, KeyboardInterrupt())
    how = {"chunk": 2, "place": Place(tmp_path, {"seed": 5})}
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(net, recipe(), 5, KEY, watch=Watcher(progress=stop), **how)
    seen = []
    again = synthesize_images(net, recipe(), 5, KEY, watch=Watcher(progress=seen.append), **how)
    same(again, whole)
    left = [(b, s) for b in range(3) for s in (2, 4, 6) if (b, s) > (batch, step)]
    assert [(p.batch, p.step) for p in seen] == left


def test_finished_batches_survive_any_crash(whole, net, tmp_path):
    stop = crash_at(2, 2, RuntimeError("power cut"))
    how = {"chunk": 2, "place": Place(tmp_path)}
    with pytest.raises(RuntimeError, match="power cut"):
        synthesize_images(net, recipe(), 5, KEY, watch=Watcher(progress=stop), **how)
    seen = []
    same(
        synthesize_images(net, recipe(), 5, KEY, watch=Watcher(progress=seen.append), **how), whole
    )
    assert {p.batch for p in seen} == {2}


def test_state_of_another_run_is_refused(net, tmp_path):
    """Also when the crash came exactly between two batches."""
    one = recipe(steps=2)
    synthesize_images(net, one, 2, KEY, place=Place(tmp_path, {"seed": 5}))
    with pytest.raises(UsageError, match=r"different run:\n  seed: saved 5, now 6"):
        synthesize_images(
            net,
            one,
            4,
            jax.random.key(6),
            place=Place(tmp_path, {"seed": 6}),
        )


def louder(observed):
    """Another term than the one it stands for."""
    return 2 * image_statistics(observed)


def test_state_of_another_recipe_of_the_same_settings_is_refused(net, tmp_path):
    made = recipe(steps=2)
    synthesize_images(net, made, 2, KEY, place=Place(tmp_path))
    other = made._replace(terms=(made.terms[0], made.terms[1]._replace(fn=louder)))
    message = r"recipe: terms: 1: fn: is: saved '.*:image_statistics', now '.*:louder'"
    with pytest.raises(UsageError, match=message):
        synthesize_images(net, other, 2, KEY, place=Place(tmp_path))
    same(
        synthesize_images(net, recipe(steps=2), 2, KEY, place=Place(tmp_path)),
        synthesize_images(net, made, 2, KEY),
    )


def test_recipes_without_names_keep_nothing_on_disk(net, tmp_path):
    nameless = recipe(steps=2, terms=(Term("bn", 1.0, lambda o: batch_norm_match(o)),))
    assert len(synthesize_images(net, nameless, 2, KEY).images) == 2
    with pytest.raises(UsageError, match=r"^recipe\.terms\[0\]\.fn is .*<lambda>, .*values\.bound"):
        synthesize_images(net, nameless, 2, KEY, place=Place(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_batch_is_made_again(damage, whole, net, tmp_path):
    stop = crash_at(2, 2, RuntimeError("power cut"))
    how = {"chunk": 2, "place": Place(tmp_path)}
    with pytest.raises(RuntimeError, match="power cut"):
        synthesize_images(net, recipe(), 5, KEY, watch=Watcher(progress=stop), **how)
    file = tmp_path / "batch_0.npz"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    other = io.BytesIO()
    np.savez(other, images=np.zeros(3))
    damaged = {"cut": data[:-40], "flipped": data, "empty": b"", "other": other.getvalue()}
    file.write_bytes(damaged[damage])
    seen = []
    same(
        synthesize_images(net, recipe(), 5, KEY, watch=Watcher(progress=seen.append), **how), whole
    )
    assert len({p.batch for p in seen}) == 2  # the damaged one and the last, no more


def climber(limit, factors):
    """Goes up by the learning rate at each step; NaN beyond `limit`."""

    def term(o):
        top = jnp.max(o.natural)
        return jnp.where(top > limit, jnp.nan, -jnp.mean(o.natural) * o.natural.size)

    def optimizer(factor):
        factors.append(factor)
        return optax.sgd(factor)

    return recipe(
        steps=4,
        source=Source(lambda key, shape: jnp.zeros(shape)),
        terms=(Term("climb", 1.0, term),),
        optimizer=optimizer,
    )


def test_divergence_restarts_at_half_the_rate(net):
    found = synthesize_images(net, climber(1.2, []), 2, KEY)
    np.testing.assert_allclose(found.images, 1.0, rtol=1e-5)  # 4 steps of 1/4


def test_divergence_at_every_rate_is_an_error(net):
    factors = []
    message = (
        r"small: the loss became NaN or infinite at step 1 in each of 4 attempts, "
        r"the last at 1/8 of the learning rate\. .*fewer `steps=`"
    )
    with pytest.raises(DivergedError, match=message):
        synthesize_images(net, climber(0.01, factors), 2, KEY)
    assert list(dict.fromkeys(factors)) == [1.0, 0.5, 0.25, 0.125]


def test_prepare_condition_and_render_reach_the_terms(net):
    contract = InputContract(6, 6, (0.5, 0.4, 0.3), (0.5, 0.25, 1.0))
    model = type(net)(net.graph, net.params, (contract,))
    seen = {}

    def term(o):
        seen.update(shared=o.shared, labels=o.labels.shape, logits=o.logits.shape)
        return jnp.sum((o.natural - o.shared) ** 2) + 0.0 * jnp.sum(o.images)

    full = recipe(
        steps=40,
        terms=(Term("pull", 1.0, term),),
        optimizer=lambda factor: optax.sgd(0.1),
        source=Source(
            lambda key, shape: {"latent": gaussian(key, shape)}, lambda x: 2 * x["latent"]
        ),
        prepare=lambda m, targets, key: jnp.float32(len(targets) / 4),
        condition=lambda key, size, classes: jnp.zeros((size, classes)),
    )
    found = synthesize_images(model, full, 3, KEY)
    assert (seen["labels"], seen["logits"]) == ((2, 5), (2, 5))
    wanted = from_natural(jnp.full((3, 6, 6, 3), 0.5), contract)
    np.testing.assert_allclose(found.images, wanted, atol=1e-4)


def test_bounded_images_are_possible_pixels(net):
    """What comes back and what the network saw; the variables themselves may leave the range."""
    tops = []

    def term(o):
        jax.debug.callback(lambda v: tops.append(float(v)), jnp.max(jnp.abs(o.natural)))
        return -jnp.mean(o.natural) * 100.0

    wild = recipe(terms=(Term("up", 1.0, term),), optimizer=lambda factor: optax.sgd(1.0))
    bounded = synthesize_images(net, wild._replace(bounded=True), 2, KEY)
    pixels = np.asarray(bounded.images) * net.contract.std + net.contract.mean
    assert pixels.max() == pytest.approx(1, abs=1e-5)
    assert pixels.min() >= -1e-5
    jax.effects_barrier()
    assert max(tops) < 2.7
    free = synthesize_images(net, wild, 2, KEY)
    assert float(free.images.max()) > 2.7


@pytest.mark.parametrize(
    ("batch", "n", "layers", "per_layer", "size"),
    [
        (32, 100, 4, False, 32),
        (32, 5, 4, False, 5),
        (40, 100, 4, True, 40),
        (40, 100, 7, True, 42),
        (40, 3, 4, True, 4),
        (2, 1, 20, True, 20),
    ],
)
def test_batch_sizes(batch, n, layers, per_layer, size):
    assert batch_size(recipe(batch=batch, per_layer=per_layer), n, layers) == size


def test_impossible_requests(net):
    with pytest.raises(ValueError, match=r"synthesize_images\(\) needs n >= 1, got 0"):
        synthesize_images(net, recipe(), 0, KEY)
    with pytest.raises(UnsupportedModelError, match="it has 0 batch norms"):
        synthesize_images(fold_batch_norm(net), recipe(), 1, KEY)


@pytest.mark.parametrize(
    ("name", "classes", "shown"),
    [("unet", 0, "8x8x3"), ("two_heads", 0, "5, 1"), ("single", 0, "1"), ("stem", 5, None)],
)
def test_labels_are_left_out_where_there_are_no_classes(name, classes, shown, nets):
    if name == "single":
        b = nets.Builder(InputContract(6, 6))
        x = b.op("pool", GlobalAvgPool(), b.unit("conv", "images", 4))
        model = b.done(b.linear("number", x, 1))
    else:
        model = getattr(nets, name)()
    assert classes_of(model) == classes
    full = best(steps=2, batch=2)
    fitting, notes = suited(full, model)
    if shown is None:
        assert (fitting, notes) == (full, ())
        return
    assert [t.name for t in fitting.terms] == ["batch norm"]
    assert notes == (f"no class labels: the network's output is {shown}; without labels",)
    made = synthesize_images(model, full, 2, KEY)
    assert made.notes == notes
    assert np.isfinite(made.images).all()
    plain = recipe()
    assert suited(plain, model) == (plain, ())  # nothing to leave out


def test_nothing_is_optimised_without_an_objective(net):
    plain = recipe(terms=(), stages=(), batch=2)
    found = synthesize_images(net, plain, 5, KEY)
    assert (found.losses, found.images.shape) == ((), (5, 6, 6, 3))
    first = gaussian(jax.random.fold_in(KEY, 0), (2, 6, 6, 3))
    np.testing.assert_allclose(found.images[:2], from_natural(first, net.contract), atol=1e-5)
    folded = synthesize_images(fold_batch_norm(net), plain, 2, KEY)  # no statistics needed
    np.testing.assert_array_equal(folded.images, found.images[:2])
