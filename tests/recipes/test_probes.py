"""Probes: one set for every quantized form of a network."""

import jax
import numpy as np
import pytest

from dfq_jax.optim.state import Place
from dfq_jax.recipes import probes
from dfq_jax.recipes.probes import (
    PROBES,
    base_pixels,
    probes_from,
    probes_of,
    varied,
)
from dfq_jax.synthesis.recipe import half_labelled
from dfq_jax.synthesis.sources.pixels import to_pixels


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(probes, "SMALL_BASE", (8, 10))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (8, 16, 14, 3), dtype=np.uint8)


def test_half_of_a_batch_has_labels():
    found = np.asarray(half_labelled(jax.random.key(0), 8, 5))
    assert found[::2].sum(1) == pytest.approx(np.ones(4))
    assert not found[1::2].any()


def test_a_network_has_one_set_of_8_bit_images(nets):
    model = nets.tiny()
    one, other = probes_of(model), probes_of(model)
    assert len(one) == PROBES
    assert np.asarray(one.images).tobytes() == np.asarray(other.images).tobytes()
    whole = to_pixels(one.images, model.contract)
    assert np.asarray(probes.from_pixels(whole, model.contract)).tobytes() == (
        np.asarray(one.images).tobytes()
    )
    assert one.provenance["base"] == 8
    assert len(np.unique(whole.reshape(PROBES, -1), axis=0)) > 0.95 * PROBES


def test_another_network_has_others(nets):
    one, other = (probes_of(nets.tiny(seed), n=12).images for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_base_images_make_the_whole_set_again(nets):
    model = nets.tiny()
    whole = probes_of(model)
    again = probes_from(base_pixels(whole), model.contract)
    assert np.asarray(again.images).tobytes() == np.asarray(whole.images).tobytes()


def test_a_resumed_run_finds_what_is_finished(nets, monkeypatch, tmp_path):
    model = nets.tiny()
    whole = probes_of(model, place=Place(tmp_path) / "probes")
    monkeypatch.delattr("dfq_jax.synthesis.run.attempts.fit")
    again = probes_of(model, place=Place(tmp_path) / "probes")
    assert np.asarray(again.images).tobytes() == np.asarray(whole.images).tobytes()


def test_a_network_without_statistics_gets_noise(nets):
    found = probes_of(nets.vit(), n=20)
    assert found.provenance["method"] == "noise"
    assert len(found) == found.provenance["base"] == 20


def test_variations_lie_between_base_images(pixels):
    made = varied(pixels, 41)
    assert made.shape == (41, 16, 14, 3)
    assert made.dtype == np.uint8
    blend = made[0].astype(float).reshape(-1)
    random = np.random.default_rng(probes.SEED)
    first, second = random.permutation(8)[:2]
    share = random.uniform(0.5, 1)
    wanted = share * pixels[first].astype(float) + (1 - share) * pixels[second]
    assert blend == pytest.approx(wanted.reshape(-1), abs=0.51)
    assert (varied(pixels, 3) == made[:3]).all()


def test_one_base_image_is_varied_too(pixels):
    assert (varied(pixels[:1], 1)[0] == pixels[0]).all()
