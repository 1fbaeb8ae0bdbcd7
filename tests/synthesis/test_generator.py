import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.synthesis.sources.generator import generated, latent_source

KEY = jax.random.key(2)
SMALL = latent_source(latent=12, channels=(6, 5))
make = jax.jit(generated)
init = jax.jit(SMALL.init, static_argnums=1)


@pytest.fixture(scope="module")
def variables():
    """Of four images of 8x12 pixels."""
    return init(KEY, (4, 8, 12, 3))


def in_torch(torch, x, height, width):
    """The generator as the card writes it, on NCHW; returns images and its leaves."""
    F = torch.nn.functional
    leaf = lambda v: torch.tensor(np.array(v), requires_grad=True)
    params = jax.tree.map(leaf, x["generator"])
    latent = leaf(x["latent"])
    rows = lambda v, first: v.permute(*range(first), -1, first, first + 1).flatten(first)
    norm = lambda v, p: F.batch_norm(v, None, None, p.get("scale"), p.get("bias"), True)
    conv = lambda v, p: F.conv2d(v, p["kernel"].permute(3, 2, 0, 1), p["bias"], padding=1)
    up = lambda v: F.interpolate(v, scale_factor=2, mode="nearest")
    project = params["project"]
    v = F.linear(latent, rows(project["kernel"], 1).T, rows(project["bias"], 0))
    v = norm(v.view(len(v), -1, height // 4, width // 4), params["norm1"])
    v = F.leaky_relu(norm(conv(up(v), params["conv1"]), params["norm2"]), 0.2)
    v = norm(torch.tanh(conv(up(v), params["conv2"])), {})
    return v.permute(0, 2, 3, 1), {"latent": latent, "generator": params}


@pytest.mark.torch
def test_images_and_gradients_match_torch(variables):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda v: v + 0.1 * rng.normal(size=v.shape).astype(np.float32), variables)
    theirs, leaves = in_torch(torch, moved, 8, 12)
    assert theirs.shape == (4, 8, 12, 3)
    np.testing.assert_allclose(make(moved), theirs.detach().numpy(), atol=2e-5)
    pull = rng.normal(size=theirs.shape).astype(np.float32)
    (theirs * torch.tensor(pull)).sum().backward()
    ours = jax.jit(jax.grad(lambda x: jnp.sum(generated(x) * pull)))(moved)
    for mine, leaf in zip(jax.tree.leaves(ours), jax.tree.leaves(leaves), strict=True):
        wanted = leaf.grad.numpy()
        scale = max(np.abs(wanted).max(), 0.2)  # biases before a batch norm have no slope at all
        np.testing.assert_allclose(mine, wanted, atol=1e-4 * scale)


def test_parameters_start_as_pytorchs_do():
    x = latent_source(latent=64, channels=(32, 16)).init(KEY, (2, 32, 32, 3))
    params = x["generator"]
    fans = {"project": 64, "conv1": 32 * 9, "conv2": 16 * 9}
    assert set(params) == {*fans, "norm1", "norm2"}  # the last norm has no parameters
    for name, fan in fans.items():
        limit = fan**-0.5
        for slot in ("kernel", "bias"):
            values = np.asarray(params[name][slot]).ravel()
            assert np.abs(values).max() <= limit
            if values.size > 100:
                assert np.abs(values).max() > 0.98 * limit
                assert values.std() == pytest.approx(limit / 3**0.5, rel=0.05)
                assert values.mean() == pytest.approx(0, abs=0.1 * limit)
        assert not np.array_equal(params[name]["bias"], params[name]["kernel"].ravel()[: fan // 9])
    for name in ("norm1", "norm2"):
        assert np.all(np.asarray(params[name]["scale"]) == 1)
        assert np.all(np.asarray(params[name]["bias"]) == 0)
    shapes = {k: v["kernel"].shape for k, v in params.items() if "kernel" in v}
    assert shapes == {"project": (64, 8, 8, 32), "conv1": (3, 3, 32, 16), "conv2": (3, 3, 16, 3)}


def test_default_sizes():
    x = jax.eval_shape(lambda key: latent_source().init(key, (5, 32, 32, 3)), KEY)
    assert x["latent"].shape == (5, 256)
    assert x["generator"]["project"]["kernel"].shape == (256, 8, 8, 128)
    assert x["generator"]["conv1"]["kernel"].shape == (3, 3, 128, 64)


def test_every_colour_is_standardised_over_the_batch(variables):
    """Not in each image: images differ in brightness."""
    images = np.asarray(make(variables), np.float64)
    assert images.shape == (4, 8, 12, 3)
    assert np.abs(images.mean((0, 1, 2))).max() < 1e-4
    assert np.abs(images.std((0, 1, 2)) - 1).max() < 1e-2
    assert images.mean((1, 2)).std(0).min() > 1e-2


def test_codes_are_normal_and_fresh(variables):
    codes = init(KEY, (500, 4, 4, 1))["latent"]
    assert codes.shape == (500, 12)
    assert float(codes.mean()) == pytest.approx(0, abs=0.05)
    assert float(codes.std()) == pytest.approx(1, abs=0.05)
    other = init(jax.random.key(3), (4, 8, 12, 3))
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(variables), strict=True):
        flat = np.asarray(a).ravel()
        norm = np.all(flat == flat[0])
        assert norm or not np.array_equal(a, b)


def test_grey_images_of_several_batches_at_once():
    keys = jax.random.split(KEY, 3)
    alone = lambda key: generated(SMALL.init(key, (2, 4, 8, 1)))
    images = jax.jit(jax.vmap(alone))(keys)
    assert images.shape == (3, 2, 4, 8, 1)
    np.testing.assert_allclose(images[1], jax.jit(alone)(keys[1]), atol=1e-5)


def test_images_are_the_source(variables):
    np.testing.assert_array_equal(SMALL.render(variables), generated(variables))
    images = make(variables)
    assert SMALL.finish(images) is images


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (8, 12)])
def test_sizes_it_makes(size):
    assert SMALL.refusal((1, *size, 3)) is None


@pytest.mark.parametrize("size", [(6, 8), (8, 6), (299, 299)])
def test_sizes_it_cannot_make(size):
    reason = SMALL.refusal((1, *size, 3))
    assert reason is not None
    assert f"this network reads {size[0]}x{size[1]} pixels" in reason
    assert "sizes divisible by 4; 224 and 32 work" in reason
