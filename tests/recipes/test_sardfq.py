"""SARDFQ against NumPy: maps of Gaussians, attention of a class token, crops with classes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.optim.progress import Watcher
from dfq_jax.recipes.sardfq import sardfq
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.sources.pixels import from_natural
from dfq_jax.synthesis.terms.semantics import (
    CROPS,
    Prior,
    attention_prior,
    attention_weights,
    crop_entropy,
    crops_of,
    mixture,
    patch_grid,
    prior_maps,
    soft_label_entropy,
    soft_semantics,
)

KEY = jax.random.key(11)
NO_NETWORK: Any = None


def in_float(v):
    return jnp.asarray(v, jnp.float32)


@pytest.fixture(scope="module")
def vit(nets):
    return nets.vit()


@pytest.fixture(scope="module")
def semantics():
    return soft_semantics(KEY, 8, 5)


def test_a_centred_gaussian_is_a_map():
    centres, spreads, weights = np.full((1, 2), 0.5), np.array([[0.2, 0.1]]), np.ones(1)
    made = mixture(in_float(centres), in_float(spreads), in_float(weights), (3, 4))
    down, right = (np.arange(3) + 0.5) / 3 - 0.5, (np.arange(4) + 0.5) / 4 - 0.5
    wanted = np.exp(-((down[:, None] / 0.2) ** 2 + (right / 0.1) ** 2) / 2)
    np.testing.assert_allclose(made, (wanted / wanted.sum()).ravel(), rtol=1e-4)
    assert float(made.sum()) == pytest.approx(1, abs=1e-6)


def test_mixtures_add_gaussians_by_weight():
    rng = np.random.default_rng(0)
    centres, spreads = rng.uniform(size=(2, 3, 2)), rng.uniform(0.1, 0.3, size=(2, 3, 2))
    weights = np.array([[1.0, 0.5, 0.0], [0.7, 0.0, 0.0]])
    made = mixture(in_float(centres), in_float(spreads), in_float(weights), (4, 4))
    places = np.stack(np.meshgrid(*[(np.arange(4) + 0.5) / 4] * 2, indexing="ij"), -1)
    apart = (places[None, None] - centres[:, :, None, None]) / spreads[:, :, None, None]
    heights = (weights[:, :, None, None] * np.exp(-0.5 * (apart**2).sum(-1))).sum(1)
    wanted = (heights / heights.sum((1, 2), keepdims=True)).reshape(2, 16)
    np.testing.assert_allclose(made, wanted, rtol=1e-4)


def test_maps_are_attention_and_differ():
    maps = np.asarray(prior_maps(KEY, (6, 2), (4, 4))).reshape(12, 16)
    np.testing.assert_allclose(maps.sum(1), 1, rtol=1e-5)
    assert maps.min() >= 0
    apart = np.abs(maps[:, None] - maps[None]).sum(-1) + np.eye(12)
    assert apart.min() > 0.05


def taps_of(maps, own):
    """Weights of attention whose class token attends to itself by `own`, and to patches by maps."""
    images, heads, patches = maps.shape
    first = np.concatenate([np.full((images, heads, 1), own), maps], axis=2)
    rest = np.full((images, heads, patches, patches + 1), 1 / (patches + 1))
    return jnp.asarray(np.concatenate([first[:, :, None], rest], axis=2), jnp.float32)


def test_nothing_is_lost_where_attention_is_the_map(scenes):
    """Of three blocks the last two count, by their depth."""
    shared = Prior(NO_NETWORK, KEY)
    drawn = {n: np.asarray(prior_maps(jax.random.fold_in(KEY, n), (2, 3), (2, 4))) for n in (2, 3)}
    other = np.random.default_rng(0).dirichlet(np.ones(8), size=(2, 3))
    images = np.zeros((2, 8, 16, 3))

    def loss(*blocks):
        taps = {str(i): taps_of(maps, 0.0) for i, maps in enumerate(blocks)}
        return float(attention_prior(scenes.observed(images=images, taps=taps, shared=shared)))

    assert loss(other, drawn[2], drawn[3]) == pytest.approx(0, abs=1e-12)
    for blocks, at, share in (
        ((other, other, drawn[3]), 2, 2 / 3),
        ((other, drawn[2], other), 3, 1),
    ):
        wanted = share * ((other - drawn[at]) ** 2).mean((0, 2)).sum()
        assert loss(*blocks) == pytest.approx(wanted, rel=1e-4)


def test_attention_is_read_behind_softmax(vit, nets):
    found = attention_weights(vit.graph)
    assert list(found) == ["attention0.weights", "attention1.weights"]
    tensors = nets.forward(vit, nets.images(vit, 3))
    for name in found:
        np.testing.assert_allclose(np.sum(tensors[name], -1), 1, rtol=1e-4)
        assert tensors[name].shape == (3, 2, 5, 5)


@pytest.mark.parametrize(
    ("shape", "told"),
    [((2, 3, 198, 198), "197 tokens"), ((8, 3, 50, 50), "class token"), ((2, 3, 1, 1), "class")],
)
def test_attention_without_a_class_token_is_refused(scenes, shape, told):
    taps = {"weights": jnp.zeros(shape)}
    seen = scenes.observed(images=np.zeros((2, 8, 8, 3)), taps=taps, shared=Prior(NO_NETWORK, KEY))
    with pytest.raises(UnsupportedModelError, match=told):
        attention_prior(seen)


def test_grids_have_the_shape_of_their_images():
    assert patch_grid(196, 224, 224) == (14, 14)
    assert patch_grid(8, 8, 16) == (2, 4)
    assert patch_grid(1, 1, 1) == (1, 1)


def test_crops_do_not_overlap(semantics):
    windows, present = np.asarray(semantics.windows), np.asarray(semantics.present)
    assert sorted(present.sum(1)) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert present[:, 0].all()
    fine = (np.arange(200) + 0.5) / 200
    for each in windows:
        painted = np.zeros((200, 200))
        for top, left, high, wide in each:
            assert 0 <= top <= top + high <= 1
            assert 0 <= left <= left + wide <= 1
            rows, columns = (fine > top) & (fine < top + high), (fine > left) & (fine < left + wide)
            painted[np.ix_(rows, columns)] += 1
        assert painted.max() == 1
        assert painted.mean() > 0.2
    firsts = {tuple(each[0, :2] > 0.3) for each in windows}
    assert len(firsts) > 1  # in no order


def test_labels_are_as_sure_as_scores_of_5_to_10(semantics):
    for labels in (semantics.labels, semantics.crop_labels.reshape(-1, 5)):
        chances = np.asarray(labels, np.float64)
        odds = np.log(chances.max(1) / chances.min(1))
        assert odds.min() > 4.9
        assert odds.max() < 10.1
        np.testing.assert_allclose(chances.sum(1), 1, rtol=1e-5)
        assert ((chances > chances.min(1, keepdims=True) * 1.5).sum(1) == 1).all()


def observed_of(vit, scenes, semantics, natural):
    return scenes.observed(images=natural, labels=semantics, shared=Prior(vit, KEY))


def test_crops_are_judged_by_labels_of_their_own(vit, nets, scenes, semantics):
    natural = jax.random.normal(KEY, (8, 8, 8, 3))
    found = float(crop_entropy(observed_of(vit, scenes, semantics, natural)))
    image, crop = np.nonzero(np.asarray(semantics.present))
    assert len(image) == 20 == sum(1 + n % CROPS for n in range(8))
    views = crops_of(natural, jnp.asarray(image), semantics.windows[image, crop])
    logits = nets.run(vit, from_natural(views, vit.contract))
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = -(np.asarray(semantics.crop_labels)[image, crop] * np.log(chances)).sum(1).mean()
    assert found == pytest.approx(wanted, rel=1e-4)
    whole = scenes.observed(logits=np.asarray(logits)[:8], labels=semantics)
    wanted = -(np.asarray(semantics.labels) * np.log(chances[:8])).sum(1).mean()
    assert float(soft_label_entropy(whole)) == pytest.approx(wanted, rel=1e-4)


def test_a_crop_is_its_window_enlarged():
    torch = pytest.importorskip("torch")
    natural = jax.random.normal(KEY, (2, 8, 8, 3))
    window = jnp.array([[0.25, 0.5, 0.5, 0.375]])
    view = crops_of(natural, jnp.array([1]), window)[0]
    down = torch.linspace(-1, 1, 17)[1::2] * 0.5  # centre 0 of -1..1, half of the height
    right = torch.linspace(-1, 1, 17)[1::2] * 0.375 + 0.375
    grid = torch.stack(torch.meshgrid(down, right, indexing="ij"), -1).flip(-1)[None]
    image = torch.tensor(np.asarray(natural[1])).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.grid_sample(
        image, grid, align_corners=False, padding_mode="border"
    )
    np.testing.assert_allclose(view, wanted[0].permute(1, 2, 0), atol=1e-4)


def test_gradients_of_a_crop_stay_inside():
    natural, window = jax.random.normal(KEY, (2, 8, 8, 3)), jnp.array([[0.25, 0.5, 0.5, 0.375]])
    loss = lambda v: jnp.sum(crops_of(v, jnp.array([1]), window) ** 2)
    reached = np.asarray(jnp.any(jax.grad(loss)(natural) != 0, -1))
    wanted = np.zeros((2, 8, 8), bool)
    wanted[1, 2:6, 4:7] = True
    np.testing.assert_array_equal(reached, wanted)


def test_images_come_to_show_what_they_should(vit):
    seen = []
    recipe = sardfq(steps=60, batch=4)
    made = synthesize_images(vit, recipe, 4, KEY, chunk=5, watch=Watcher(progress=seen.append))
    assert (made.images.shape, made.excluded, made.notes) == ((4, 8, 8, 3), (), ())
    first, last = seen[0].parts, seen[-1].parts
    assert {"APA", "SL", "MSR", "TV"} <= set(first)
    assert all(last[name] < first[name] for name in ("APA", "SL", "MSR"))
    assert last["loss"] < first["loss"]


def test_settings(tiny_net):
    recipe = sardfq(crops=0.0, attention=10.0)
    assert [(t.name, t.weight, t.classes) for t in recipe.terms] == [
        ("APA", 10.0, False),
        ("SL", 1.0, True),
        ("TV", 0.05, False),
    ]
    assert (sardfq().steps, sardfq().batch, sardfq().statistics) == (1000, 32, False)
    assert sardfq() == sardfq()
    with pytest.raises(UnsupportedModelError, match="no attention"):
        synthesize_images(tiny_net, sardfq(steps=2, batch=2), 2, KEY)
