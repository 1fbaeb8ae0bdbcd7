"""Every method on images of unusual sizes: it works, or says why it cannot.

Two steps each on the smallest networks; batches, classes and channels are unusual along the way.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dfq_jax.errors import ResourceError, UnsupportedModelError, UsageError
from dfq_jax.graph.ops import Concat, GlobalAvgPool, MatMul, Reshape, Softmax
from dfq_jax.recipes.mct import mct
from dfq_jax.recipes.presets import METHODS, OFFERS, recipe_for
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.synthesis.run import limits
from dfq_jax.synthesis.run.engine import measured, synthesize_images
from dfq_jax.synthesis.run.limits import least_bytes, refuse_hopeless
from dfq_jax.synthesis.terms.estimates import estimated
from dfq_jax.types import InputContract

KEY = jax.random.key(3)
CLASSES = 7
SMALL = {
    "genie": {"latent": 4, "channels": (4, 3)},
    "dsg": {"noise_images": 8},
    "mct": {"margin": 4},
}
ON_ATTENTION = ("psaq_vit", "sardfq")


def contract(height, width, channels=3):
    if channels == 3:
        return InputContract(height, width)
    return InputContract(height, width, (0.4,) * channels, (0.3,) * channels)


def convolutions(nets, of):
    """Two batch norms, no layer that knows the size of its input."""
    b = nets.Builder(of)
    x = b.unit("second", b.unit("first", "images", 4, stride=2), 5, kernel=1)
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), CLASSES))


def attention(nets, of):
    """Patches of four pixels (or one) and a class token, which attend to each other once."""
    b, side = nets.Builder(of), min(4, of.height)
    count = of.height // side * (of.width // side)
    none = ((0, 0), (0, 0))
    x = b.conv("patches", "images", 4, kernel=side, stride=side, padding=none)
    x = b.op("tokens", Reshape((count, 4)), x)
    x = b.op("joined", Concat(1), b.constant("token", b.rng.normal(size=(1, 1, 4))), x)
    q, k, v = (b.linear(name, x, 4) for name in "qkv")
    weights = b.op("weights", Softmax(), b.op("scores", MatMul(True), q, k))
    x = b.linear("out", b.op("attended", MatMul(), weights, v), 4)
    x = b.op("first", Reshape((4,)), b.part("cut", x, 0, 1, axis=1))
    return b.done(b.linear("head", x, CLASSES))


def network(nets, method, of):
    """One that the method has a use for."""
    model = (attention if method in ON_ATTENTION else convolutions)(nets, of)
    return estimated(model) if method == "gzsq" else model


def small(method, batch):
    """The method with two steps and little work in each."""
    steps = {} if method == "noise" else {"steps": 2}
    return OFFERS[method].make(batch=batch, **steps, **SMALL.get(method, {}))


def made(nets, method, of, batch, n):
    """Images that are all there, finite and different from each other, made without a word."""
    found = synthesize_images(network(nets, method, of), small(method, batch), n, KEY)
    images = np.asarray(found.images)
    assert images.shape == (n, *of.shape)
    assert np.isfinite(images).all()
    assert np.isfinite(found.losses).all()
    assert found.notes == ()
    return images


@pytest.mark.parametrize("method", METHODS)
def test_images_that_are_not_square(method, nets):
    """Fewer of them than a batch holds, and than there are classes."""
    images = made(nets, method, contract(24, 40), batch=8, n=3)
    assert len(np.unique(images.reshape(3, -1), axis=0)) == 3


@pytest.mark.parametrize("method", METHODS)
def test_grey_images_one_by_one(method, nets):
    """Statistics of a batch are those of one image; more images than a batch holds."""
    images = made(nets, method, contract(8, 12, 1), batch=1, n=2)
    assert np.abs(images[0] - images[1]).max() > 0.1


@pytest.mark.parametrize(
    "method", ["best", "deepinversion", "mct", "genie", "noise", *ON_ATTENTION]
)
def test_images_of_four_channels(method, nets):
    """Of those that treat images in a way of their own, the others only see the batch norms."""
    made(nets, method, contract(8, 8, 4), batch=3, n=3)


REFUSED = {
    "deepinversion": (UsageError, r"images of 0x0, half its size .*resolution=\"full\""),
    "genie": (UsageError, "sizes divisible by 4, and this network reads 1x1 pixels"),
    "psaq_vit": (UnsupportedModelError, "never sees two patches beside a first token"),
}


@pytest.mark.parametrize("method", METHODS)
def test_images_of_one_pixel(method, nets):
    of = contract(1, 1, 4)
    if method in REFUSED:
        kind, message = REFUSED[method]
        with pytest.raises(kind, match=message):
            made(nets, method, of, batch=2, n=2)
    else:
        made(nets, method, of, batch=2, n=2)


def test_deepinversion_chooses_what_one_pixel_allows(nets):
    model = convolutions(nets, contract(1, 1))
    found = synthesize_images(model, recipe_for("deepinversion", 2, 2, model=model), 2, KEY)
    assert found.images.shape == (2, 1, 1, 3)
    assert found.notes == ()


@pytest.mark.parametrize("size", [(6, 8), (8, 10), (3, 3)])
def test_generators_refuse_before_anything_is_computed(size, nets, monkeypatch):
    monkeypatch.setattr("dfq_jax.synthesis.run.engine.ready", None)
    message = f"genie: the generator makes images of sizes divisible by 4, .* {size[0]}x{size[1]}"
    with pytest.raises(UsageError, match=message):
        synthesize_images(convolutions(nets, contract(*size)), small("genie", 2), 2, KEY)


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (-1, 8), (8, -4)])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match=f"needs a positive size, got {size[0]}x{size[1]}"):
        InputContract(*size)


# sizes beyond any machine


@pytest.fixture(scope="module")
def huge(nets):
    """Networks that read images of 100,000 x 100,000 pixels, without weights of that size."""
    small = {m: network(nets, m, contract(8, 8)) for m in ("best", *ON_ATTENTION)}
    side = {"height": 100_000, "width": 100_000}

    def of(method):
        model = small.get(method, small["best"])
        return dataclasses.replace(model, inputs=(dataclasses.replace(model.contract, **side),))

    return of


PLAIN = 32 * 100_000**2 * 3 * 4
"""Bytes of 32 such images."""


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ON_ATTENTION])
def test_images_beyond_memory_are_refused_with_the_bytes(method, huge, monkeypatch):
    """Before anything is allocated: nothing after the look at shapes is there to be called."""
    for name in ("ready", "unfitted"):
        monkeypatch.setattr(f"dfq_jax.synthesis.run.engine.{name}", None)
    recipe = OFFERS[method].make(batch=32)
    with pytest.raises(ResourceError, match="smaller size, or use a smaller `batch=`") as caught:
        synthesize_images(huge(method), recipe, 32, KEY)
    text = str(caught.value)
    assert text.startswith(f"{method}: 32 images of 100000x100000 pixels at a time need at least ")
    assert int(text.split("memory (")[1].split()[0]) >= 2 * PLAIN
    assert caught.value.exit_code == 5


def test_least_bytes_are_counted():
    """Variables, gradient, two moments and images; less without steps; more with turns."""
    shape = (32, 100_000, 100_000, 3)
    assert 0 <= least_bytes(zeroq(), shape) - 5 * PLAIN < 100
    assert least_bytes(small("noise", 32), shape) == 2 * PLAIN
    one = (2, 8, 8, 3)
    pixels, canvases = 2 * 8 * 8 * 3 * 4, 2 * 12 * 12 * 3 * 4
    found = least_bytes(mct(margin=4), one, turns=5)
    assert 0 <= found - (5 * (3 * canvases + pixels) + canvases) < 200
    codes = 4 * (2 * 4 + (4 + 1) * 2 * 2 * 4 + 4 * 2 + 9 * 4 * 3 + 3 + 3 * 2 + 9 * 3 * 3 + 3)
    assert 0 <= least_bytes(small("genie", 2), one) - (4 * codes + pixels) < 200


def test_what_just_fits_is_let_through(monkeypatch):
    shape = (2, 8, 8, 3)
    needed = least_bytes(zeroq(), shape)
    monkeypatch.setattr(limits, "bytes_here", lambda: needed)
    refuse_hopeless(zeroq(), shape)
    monkeypatch.setattr(limits, "bytes_here", lambda: None)
    refuse_hopeless(zeroq(), shape)
    monkeypatch.setattr(limits, "bytes_here", lambda: needed - 1)
    message = rf"zeroq: 2 images of 8x8 pixels .* 7\.5 KiB of memory \({needed} bytes\)"
    with pytest.raises(ResourceError, match=message):
        refuse_hopeless(zeroq(), shape)


def test_batches_that_take_turns_are_in_memory_at_once(nets, monkeypatch):
    model = convolutions(nets, contract(8, 8))
    four = least_bytes(small("mct", 2), (2, 8, 8, 3), turns=4)
    monkeypatch.setattr(limits, "bytes_here", lambda: four)
    assert measured(model, small("mct", 2), 8).batches == 4
    with pytest.raises(ResourceError, match="10 images of 8x8 pixels at a time"):
        measured(model, small("mct", 2), 10)
    assert measured(model, small("zeroq", 2), 1000).batches == 500


def test_the_memory_of_this_machine_is_known():
    found = limits.bytes_here()
    assert found is not None
    assert 2**28 < found < 2**50
