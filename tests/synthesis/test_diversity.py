"""Batches whose images are all alike, or blank: found, made again, told of."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dfq_jax.base.parallel import Machine
from dfq_jax.optim.progress import Watcher
from dfq_jax.optim.schedules import rated
from dfq_jax.optim.state import Place
from dfq_jax.synthesis.recipe import Memory, Recipe, Source, Stage
from dfq_jax.synthesis.run.attempts import key_of
from dfq_jax.synthesis.run.diversity import ALIKE, BLANK, contrast, fault_of, similarity, variety
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.run.processes import synthesize_shards
from dfq_jax.synthesis.run.shards import load_shards
from dfq_jax.synthesis.sources.pixels import from_natural, gaussian, nearly_black, pink
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.match import batch_norm_match
from dfq_jax.types import InputContract
from dfq_jax.values import bound

KEY = jax.random.key(5)
SHAPE = (5, 6, 7, 3)
CONTRACT = InputContract(6, 7)
NOISE = gaussian(KEY, SHAPE)


# the measures


def centred(images):
    """Flat images less the mean of each channel, in double precision."""
    x = np.asarray(images, np.float64)
    return (x - x.mean((1, 2), keepdims=True)).reshape(len(x), -1)


@pytest.mark.parametrize("shared", [0.0, 0.5, 0.9, 0.999])
def test_similarity_is_the_mean_cosine_of_all_pairs(shared):
    """Of images of mean 0 and equal length; and the closed form is the same number."""
    flat = centred(shared**0.5 * np.asarray(NOISE[:1]) + (1 - shared) ** 0.5 * np.asarray(NOISE))
    unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    pairs = [a @ b for a, b in itertools.combinations(unit, 2)]
    closed = (np.sum(unit.sum(0) ** 2) - 5) / (5 * 4)
    assert closed == pytest.approx(np.mean(pairs), abs=1e-12)
    images = jnp.asarray(3 * unit.reshape(SHAPE), jnp.float32)
    assert float(similarity(images)) == pytest.approx(closed, abs=1e-5)


def test_similarity_in_general():
    """Variances, by NumPy, of images of any brightness and contrast."""
    images = NOISE * jnp.linspace(0.5, 2, 5)[:, None, None, None] + jnp.arange(3.0)
    x = np.asarray(images, np.float64)
    wanted = 1 - x.var(0, ddof=1).mean() / x.var((1, 2)).mean()
    assert float(similarity(images)) == pytest.approx(wanted, abs=1e-5)
    bright = NOISE[:1] + 3 * jnp.arange(5.0)[:, None, None, None]
    assert float(similarity(bright)) < -1  # the same picture in another light is another image
    assert float(contrast(images)) == pytest.approx(x.std((1, 2)).max(), rel=1e-5)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_equal_images_are_entirely_alike(scale, offset):
    images = jnp.repeat(scale * (NOISE[:1] + offset), 5, axis=0)
    assert float(similarity(images)) == pytest.approx(1, abs=1e-4)
    assert float(similarity(scale * NOISE)) == pytest.approx(0, abs=0.1)


def test_the_normalisation_of_the_network_does_not_matter():
    other = InputContract(6, 7, (0.1, 0.5, 0.9), (0.3, 1.0, 0.05))
    one, two = (variety(from_natural(NOISE, c), c) for c in (CONTRACT, other))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4)


# the verdict


def verdict(natural, contract=CONTRACT):
    return fault_of(from_natural(natural, contract), contract)


@pytest.mark.parametrize("part", [0.0, 1e-3, 0.05])
def test_images_that_hardly_differ_have_collapsed(part):
    """What sets them apart is measured against their contrast, whatever that is."""
    for scale in (0.1, 1.0, 2.0):
        fault = verdict(scale * (pink(KEY, SHAPE)[:1] + part * NOISE))
        assert fault is not None
        assert fault.startswith("collapsed (similarity ")
        assert float(fault[22:27]) >= ALIKE


@pytest.mark.parametrize("part", [0.2, 0.5, 1.0])
def test_images_with_much_in_common_have_not(part):
    assert verdict(pink(KEY, SHAPE)[:1] + part * NOISE) is None


@pytest.mark.parametrize("start", [gaussian, nearly_black, pink], ids=lambda f: f.__name__)
def test_starts_of_recipes_are_sound(start):
    for batch in (1, 2, 16):
        assert verdict(start(KEY, (batch, 8, 8, 3))) is None


@pytest.mark.parametrize("value", [0.0, 0.4, 2.5, -50.0, 1e6, jnp.nan])
def test_images_without_content_are_blank(value):
    """All of one colour, or beyond one end of what pixels can be, or no numbers at all."""
    noise = NOISE if abs(value) > 10 else 0 * NOISE
    fault = verdict(value + noise)
    assert fault is not None
    assert fault.startswith("came out blank (contrast ")
    assert verdict((value + noise)[:1]) is not None  # an image on its own as well


def test_images_of_two_colours_are_not_blank():
    """As after few steps at a high rate: every pixel beyond one end or the other."""
    assert verdict(1e4 * NOISE) is None
    assert verdict(jnp.concatenate([NOISE[:1], 0 * NOISE[1:]])) is None  # one shows something
    assert verdict(10 * BLANK * NOISE) is None
    assert verdict(0.5 * BLANK * NOISE) is not None


def test_an_image_alone_resembles_none():
    assert float(similarity(NOISE[:1])) == 0
    assert verdict(NOISE[:1]) is None


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (15, 1)])
def test_images_of_a_few_pixels_are_not_judged(size):
    contract = InputContract(*size)
    assert verdict(jnp.zeros((4, *size, 3)), contract) is None
    larger = InputContract(4, 4)
    assert verdict(jnp.zeros((4, 4, 4, 3)), larger) is not None


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels):
    contract = InputContract(6, 6, (0.5,) * channels, (0.5,) * channels)
    noise = gaussian(KEY, (4, 6, 6, channels))
    assert verdict(noise, contract) is None
    assert verdict(jnp.repeat(noise[:1], 4, 0), contract) is not None


# what becomes of such batches


@pytest.fixture(scope="module")
def net(nets):
    return nets.stem()


def start_key(batch, attempt, key=KEY):
    """From which key an attempt at a batch draws its initial images."""
    return jax.random.split(key_of(jax.random.fold_in(key, batch), attempt), 3)[0]


def first_of(noise):
    return jnp.repeat(noise[:1], noise.shape[0], 0)


def noise_but(data, images, key, shape):
    noise = gaussian(key, shape)
    found = jnp.any(jnp.all(jax.random.key_data(key) == data, axis=1))
    return jnp.where(found, images(noise), noise)


def equal_from(*bad, images=first_of):
    """A source of noise, but for some keys of `images` of it: equal ones, if nothing else."""
    return Source(bound(noise_but, np.stack([jax.random.key_data(k) for k in bad]), images))


def still(source, steps=4, **changes):
    """A recipe that moves nothing, so that images are those of the source."""
    base = Recipe(
        name="still",
        settings={},
        batch=3,
        source=source,
        stages=(Stage(steps, rated(optax.sgd, 0.0)),),
        terms=(Term("bn", 1.0, batch_norm_match),),
    )
    return base._replace(**changes)


def kept(*attempts, key=KEY):
    """The initial images of an attempt at each batch."""
    keys = [start_key(batch, attempt, key) for batch, attempt in enumerate(attempts)]
    return np.concatenate([gaussian(k, (3, 6, 6, 3)) for k in keys])


SEED = "batch {} collapsed (similarity 1.000): made again from another seed"
KEPT = (
    "batch {} collapsed (similarity 1.000), as did all of 3 attempts: kept, though it tells little"
)


def same(a, b):
    np.testing.assert_array_equal(a.images, b.images)
    assert (a.losses, a.notes) == (b.losses, b.notes)


def test_a_collapsed_batch_is_made_again_from_another_seed(net):
    """The first attempt at batch 1, the first two at batch 2; the others keep their bits."""
    bad = (start_key(1, 0), start_key(2, 0), start_key(2, 1))
    seen = []
    how = {"chunk": 2, "watch": Watcher(progress=lambda p: seen.append((p.batch, p.step)))}
    found = synthesize_images(net, still(equal_from(*bad)), 12, KEY, **how)
    np.testing.assert_array_equal(found.images, kept(0, 1, 2, 0))
    assert found.notes == (SEED.format(1), SEED.format(2), SEED.format(2))
    attempts = [1, 2, 3, 1]
    assert seen == [(b, s) for b, n in enumerate(attempts) for s in [2, 4] * n]


def test_if_all_attempts_collapse_the_last_is_kept_with_a_warning(net):
    bad = [start_key(0, attempt) for attempt in range(3)]
    found = synthesize_images(net, still(equal_from(*bad)), 6, KEY)
    last = np.repeat(np.asarray(gaussian(bad[2], (3, 6, 6, 3)))[:1], 3, axis=0)
    np.testing.assert_array_equal(found.images, np.concatenate([last, kept(0, 0)[3:]]))
    assert found.notes == (SEED.format(0), SEED.format(0), KEPT.format(0))


def test_blank_batches_too(net):
    blank = equal_from(start_key(0, 0), images=lambda noise: 0 * noise + 0.5)
    found = synthesize_images(net, still(blank), 3, KEY)
    np.testing.assert_array_equal(found.images, kept(1))
    (note,) = found.notes
    assert note.startswith("batch 0 came out blank (contrast ")
    assert note.endswith("): made again from another seed")


BAD = (start_key(0, 0), start_key(1, 0), start_key(1, 1), start_key(3, 0))


@pytest.fixture(scope="module")
def whole(net):
    """Four batches on one device, never interrupted; two attempts, three, one and two."""
    found = synthesize_images(net, still(equal_from(*BAD)), 12, KEY, chunk=2)
    np.testing.assert_array_equal(found.images, kept(1, 2, 0, 1))
    return found


@pytest.mark.parametrize(("devices", "mode"), [(2, "apart"), (4, "apart"), (3, "together")])
def test_on_several_devices(devices, mode, whole, net):
    how = {"chunk": 2, "machine": Machine(devices, together=mode == "together")}
    same_images = synthesize_images(net, still(equal_from(*BAD)), 12, KEY, **how)
    np.testing.assert_array_equal(same_images.images, whole.images)
    assert same_images.notes == whole.notes
    np.testing.assert_allclose(same_images.losses, whole.losses, rtol=1e-5)


class Stop:
    """Interrupts a run at its so manieth report."""

    def __init__(self, call):
        self.left = call

    def __call__(self, _):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("call", [2, 3, 7])
def test_a_run_killed_in_any_attempt_ends_the_same(call, devices, whole, net, tmp_path):
    """In the first attempt, in the second, in a later batch."""
    how = {"chunk": 2, "machine": Machine(devices), "place": Place(tmp_path)}
    given = (net, still(equal_from(*BAD)), 12, KEY)
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(*given, **how, watch=Watcher(progress=Stop(call)))
    if call == 3:
        assert (tmp_path / "batch_0" / "stage_0_again_1" / "step_2").is_dir()
    same(synthesize_images(*given, **how), whole)
    assert not list(tmp_path.glob("batch_?"))
    same(
        synthesize_images(*given, **how, watch=Watcher(progress=Stop(1))), whole
    )  # notes are kept, too


def test_an_attempt_goes_on_where_it_was(net, tmp_path):
    seen, how = [], {"chunk": 2, "place": Place(tmp_path)}
    given = (net, still(equal_from(start_key(0, 0)), steps=8), 3, KEY)
    with pytest.raises(KeyboardInterrupt):
        synthesize_images(*given, **how, watch=Watcher(progress=Stop(6)))
    synthesize_images(*given, **how, watch=Watcher(progress=lambda p: seen.append(p.step)))
    assert seen == [2, 4, 6, 8, 6, 8]  # the first took too little time to be saved; the second


def test_memory_passes_on_from_the_attempt_that_counts(net):
    """What is handed on is of the images kept, and each attempt begins with what it was given."""
    total = Memory(start=lambda *_: jnp.zeros(()), batch=lambda o: o.memory + jnp.sum(o.natural[0]))
    term = Term("past", 1.0, lambda o: o.memory + 0 * jnp.sum(o.natural))
    recipe = still(equal_from(start_key(0, 0)), memory=total, terms=(term,))
    found = synthesize_images(net, recipe, 9, KEY)
    firsts = [float(np.sum(np.asarray(v))) for v in found.images[::3]]
    assert found.losses == pytest.approx([0, firsts[0], sum(firsts[:2])], abs=1e-3)
    assert found.notes == (SEED.format(0),)


def test_batches_that_take_turns_are_judged_one_by_one(net):
    """The second of three is blank; all are made again, since they are one optimisation."""
    first = jax.random.split(start_key(0, 0), 3)[1]
    fixed = Memory(start=lambda *_: jnp.zeros(()))
    found = synthesize_images(net, still(equal_from(first), turns=True, memory=fixed), 9, KEY)
    assert found.notes == (
        "the optimisation of 3 batches collapsed (similarity 1.000): made again from another seed",
    )
    keys = jax.random.split(start_key(0, 1), 3)
    wanted = np.concatenate([gaussian(k, (3, 6, 6, 3)) for k in keys])
    np.testing.assert_array_equal(found.images, wanted)


def test_shards_hold_the_attempt_that_counts(whole, net, tmp_path):
    share = synthesize_shards(net, still(equal_from(*BAD)), 12, KEY, tmp_path / "set", {"seed": 5})
    assert share.complete
    assert share.notes == whole.notes
    np.testing.assert_array_equal(load_shards(tmp_path / "set").images, whole.images)


def test_a_network_that_sees_nothing_makes_no_batch_suspicious(net):
    """All features are equal, whatever the image; pixels still differ."""
    params = jax.tree.map(jnp.zeros_like, {k: net.params[k] for k in ("conv1", "conv2", "fc")})
    constant = type(net)(net.graph, {**net.params, **params}, net.inputs)
    moving = still(Source(gaussian), stages=(Stage(6, lambda f: optax.adam(0.1 * f)),))
    found = synthesize_images(constant, moving, 3, KEY)
    assert found.notes == ()
