import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from dfq_jax.synthesis.sources.augment import (
    at_random,
    blur,
    centre_crop,
    compose,
    cutmix,
    flip,
    halve,
    jitter,
    random_crop,
    random_windows,
    resized_crop,
    resized_window,
    unchanged,
)

KEY = jax.random.key(3)
IMAGES = jax.random.normal(KEY, (4, 6, 8, 3))


def draws(augment, images=IMAGES, count=64):
    """What an augmentation gives for many keys."""
    return [
        np.asarray(v)
        for v in jax.lax.map(lambda k: augment(k, images), jax.random.split(KEY, count))
    ]


def test_flips_of_the_batch_and_of_each_image():
    mirrored = np.asarray(IMAGES[:, :, ::-1])
    whole = [np.array([(v == mirrored).all((1, 2, 3))]) for v in draws(flip())]
    assert {bool(v.all()) for v in whole} == {True, False}
    assert all(v.all() or not v.any() for v in whole)
    each = np.array([(v == mirrored).all((1, 2, 3)) for v in draws(flip(together=False))])
    assert 0.35 < each.mean() < 0.65
    assert any(0 < v.sum() < 4 for v in each)
    assert not any((v == mirrored).all() for v in draws(flip(chance=0.0)))
    twice = flip(chance=1.0)
    np.testing.assert_array_equal(twice(KEY, twice(KEY, IMAGES)), IMAGES)


@pytest.mark.parametrize("same", [False, True])
def test_jitter_rolls_the_whole_batch(same):
    seen = set()
    for value in draws(jitter(1, same=same)):
        hits = [
            (dy, dx)
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
            if (np.roll(IMAGES, (dy, dx), (1, 2)) == value).all()
        ]
        assert len(hits) == 1
        seen.add(hits[0])
    assert seen == {(d, d) for d in (-1, 0, 1)} if same else len(seen) == 9


def test_crops_are_windows():
    places = set()
    for value in draws(random_crop(4, 5), IMAGES):
        windows = [
            (top, left)
            for top in range(3)
            for left in range(4)
            if (IMAGES[:, top : top + 4, left : left + 5] == value).all()
        ]
        assert len(windows) == 1
        places.add(windows[0])
    assert len(places) == 12
    np.testing.assert_array_equal(centre_crop(IMAGES, 2, 4), IMAGES[:, 2:4, 2:6])


def test_the_whole_window_is_the_image():
    whole = resized_window(IMAGES[0], jnp.array([0.0, 0.0, 1.0, 1.0]))
    np.testing.assert_allclose(whole, IMAGES[0], atol=1e-5)
    np.testing.assert_allclose(
        resized_crop(smallest=1.0, ratios=(1.0, 1.0))(KEY, IMAGES), IMAGES, atol=1e-5
    )


def test_a_window_is_resized_as_torch_does():
    torch = pytest.importorskip("torch")
    image = IMAGES[0]
    found = resized_window(image, jnp.array([1 / 6, 2 / 8, 3 / 6, 4 / 8]))
    part = torch.tensor(np.asarray(image)[1:4, 2:6].transpose(2, 0, 1)[None].copy())
    wanted = torch.nn.functional.interpolate(part, (6, 8), mode="bilinear", align_corners=False)
    inner = wanted[0].permute(1, 2, 0).numpy()[1:-1, 1:-1]
    np.testing.assert_allclose(found[1:-1, 1:-1], inner, atol=1e-5)


def test_windows_that_do_not_fit_are_drawn_again():
    """As torchvision does: sides keep their ratio, and no area is more likely than another."""
    windows = np.asarray(random_windows(KEY, 2000, 0.5, (3 / 4, 4 / 3), 10))
    height, width = windows[:, 2], windows[:, 3]
    assert (windows[:, :2] + windows[:, 2:] <= 1 + 1e-6).all()
    assert 3 / 4 - 1e-5 <= (width / height).min() < (width / height).max() <= 4 / 3 + 1e-5
    assert 0.5 - 1e-5 <= (height * width).min() < 0.51
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    blank = torch.zeros(3, 1000, 1000)
    get = transforms.RandomResizedCrop.get_params
    drawn = [get(blank, [0.5, 1.0], [3 / 4, 4 / 3])[2:] for _ in range(2000)]
    areas = np.prod(np.array(drawn) / 1000, axis=1)
    np.testing.assert_allclose((height * width).mean(), areas.mean(), atol=0.01)
    never = random_windows(KEY, 5, 1.0, (1.2, 1.3), 3)
    np.testing.assert_array_equal(never[:, 2:], 1.0)


def test_windows_lie_inside_and_are_as_large_as_said():
    windows = np.asarray(random_windows(KEY, 500, 0.5, (3 / 4, 4 / 3), 0))
    assert (windows[:, :2] >= 0).all()
    assert (windows[:, :2] + windows[:, 2:] <= 1 + 1e-6).all()
    area = windows[:, 2] * windows[:, 3]
    assert area.max() > 0.95
    assert 0.43 < area.min() < 0.55  # a wide window may be cut to the image


def test_slopes_are_zero_outside_the_window():
    window = jnp.array([1 / 6, 2 / 8, 3 / 6, 4 / 8])
    slope = jax.grad(lambda x: jnp.sum(resized_window(x, window) ** 2))(IMAGES[0])
    inside = np.zeros((6, 8), bool)
    inside[0:5, 1:7] = True  # the window and the neighbours it is interpolated with
    assert (np.asarray(slope)[~inside] == 0).all()
    assert (np.asarray(slope)[1:4, 2:6] != 0).any()
    step = 1e-2 * IMAGES[1]
    change = resized_window(IMAGES[0] + step, window) - resized_window(IMAGES[0], window)
    _, pull = jax.vjp(lambda x: resized_window(x, window), IMAGES[0])
    ahead = jnp.sum(pull(IMAGES[2])[0] * step)  # linear, so exact but for rounding
    assert float(ahead) == pytest.approx(float(jnp.sum(change * IMAGES[2])), rel=1e-3)


def test_windows_of_other_images_are_pasted_at_their_own_place():
    images = jnp.arange(64, dtype=jnp.float32)[:, None, None, None] * jnp.ones((1, 12, 20, 3))
    found = np.asarray(cutmix(chance=0.5)(jax.random.key(3), images))[..., 0]
    own = np.arange(64)[:, None, None]
    strange = found != own
    assert (found[strange] == np.broadcast_to((own - 1) % 64, found.shape)[strange]).all()
    shares = []
    for each in strange:
        rows, columns = each.any(1), each.any(0)
        assert (each == rows[:, None] & columns[None]).all(), "no rectangle"
        for side in (rows, columns):
            places = np.flatnonzero(side)
            assert (np.diff(places) == 1).all()
        shares.append(each.mean())
    touched = np.array(shares) > 0
    assert 0.3 < touched.mean() < 0.7
    assert max(shares) > 0.6
    assert (np.asarray(cutmix(chance=0.0)(jax.random.key(3), images)) == images).all()


def test_blur_against_scipy():
    line = np.exp(-np.array([1.0, 0, 1]) / (2 * 1.25**2))
    line /= line.sum()
    wanted = np.asarray(IMAGES, float)
    for axis in (1, 2):
        wanted = correlate1d(wanted, line, axis=axis, mode="constant")
    np.testing.assert_allclose(blur(1.25)(KEY, IMAGES), wanted, atol=1e-6)
    flat = blur(1.25)(KEY, jnp.ones((1, 5, 5, 1)))
    np.testing.assert_allclose(flat[0, 1:-1, 1:-1], 1, rtol=1e-6)


def test_halving():
    x = np.asarray(IMAGES)
    wanted = (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(halve(KEY, IMAGES), wanted, atol=1e-6)
    assert halve(KEY, IMAGES[:, :5, :7]).shape == (4, 2, 3, 3)


def test_composition_draws_anew_for_each_part():
    both = compose(jitter(2), jitter(2), unchanged)
    first, second = (jax.random.fold_in(KEY, i) for i in (0, 1))
    np.testing.assert_array_equal(both(KEY, IMAGES), jitter(2)(second, jitter(2)(first, IMAGES)))
    assert not np.array_equal(jitter(2)(first, IMAGES), jitter(2)(second, IMAGES))


def test_a_chance():
    hits = [not np.array_equal(v, IMAGES) for v in draws(at_random(blur(1.0), 0.25))]
    assert 0.1 < np.mean(hits) < 0.45
    np.testing.assert_array_equal(at_random(blur(1.0), 0.0)(KEY, IMAGES), IMAGES)
