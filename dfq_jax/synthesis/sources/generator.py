"""Images by way of a small generator and one latent code per image, both optimised."""

from math import sqrt

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from dfq_jax.graph.lowering import convolve_tiled
from dfq_jax.graph.ops import Conv2d
from dfq_jax.synthesis.recipe import Source
from dfq_jax.values import bound

UPSCALING = 4
"""How many times larger than the generator's first feature map its images are."""


class Generator(nn.Module):
    """Latent codes to images; the codes of a batch share every normalisation.

    Attributes:
      grid: height and width of the first feature map, a quarter of the image's.
      channels: of the first feature map, and of the hidden one.
      colours: channels of the images.

    Reference:
      Jeon et al. 2023, "GENIE: Show Me the Data for Quantization", GENIE-D, as released.
    """

    grid: tuple[int, int]
    channels: tuple[int, int]
    colours: int

    @nn.compact
    def __call__(self, latent: Float[Array, "b latent"]) -> Float[Array, "b height width colours"]:
        """Images of mean 0 and deviation 1 per colour over the batch."""
        first, hidden = self.channels
        x = linear(latent, (*self.grid, first), "project")
        x = doubled(batch_norm(x, "norm1"))
        x = batch_norm(conv3x3(x, hidden, "conv1"), "norm2")
        x = doubled(nn.leaky_relu(x, 0.2))
        x = jnp.tanh(conv3x3(x, self.colours, "conv2"))
        return batch_norm(x, "norm3", affine=False)


def linear(x: Float[Array, "b n"], out: tuple[int, ...], name: str) -> Float[Array, "b ..."]:
    """A linear layer whose output has several axes."""
    init = small_uniform(x.shape[-1])
    return nn.DenseGeneral(out, kernel_init=init, bias_init=init, name=name)(x)


def conv3x3(x: Float[Array, "b h w c"], out: int, name: str) -> Float[Array, "b h w out"]:
    """A 3x3 convolution with a bias that keeps the size."""
    init = small_uniform(9 * x.shape[-1])
    op = Conv2d(padding=((1, 1), (1, 1)))
    by_backend = lambda x, kernel, *_, **__: convolve_tiled(x, kernel, op)
    return nn.Conv(
        *(out, (3, 3)),
        padding=1,
        kernel_init=init,
        bias_init=init,
        name=name,
        conv_general_dilated=by_backend,
    )(x)


def small_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform within `1 / sqrt(fan_in)`: PyTorch's start for the weights and biases of layers."""
    limit = 1 / sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def batch_norm(
    x: Float[Array, "b h w c"], name: str, *, affine: bool = True
) -> Float[Array, "b h w c"]:
    """Batch norm as in training: by the statistics of the batch, of which none are kept."""
    norm = nn.LayerNorm(
        epsilon=1e-5,
        reduction_axes=(0, 1, 2),
        feature_axes=-1,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        name=name,
    )
    return norm(x)


def doubled(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Every pixel four times: nearest neighbour at twice the size."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)


def latent_source(*, latent: int = 256, channels: tuple[int, int] = (128, 64)) -> Source:
    """A new generator and normal latent codes for every batch.

    Args:
      latent: length of a code.
      channels: of the generator's first and its hidden feature map.

    Returns:
      The source; its variables are `{"latent": Float[b latent], "generator": parameters}`.

    Reference:
      Jeon et al. 2023, "GENIE: Show Me the Data for Quantization", GENIE-D.
    """
    return Source(bound(codes_and_generator, latent, channels), generated, refusal=not_in_quarters)


def codes_and_generator(
    latent: int, channels: tuple[int, int], key: Key[Array, ""], shape: tuple[int, ...]
) -> PyTree:
    """The initial variables of `latent_source`."""
    latent_key, generator_key = jax.random.split(key)
    b, h, w, colours = shape
    codes = jax.random.normal(latent_key, (b, latent))
    generator = Generator((h // UPSCALING, w // UPSCALING), channels, colours)
    return {"latent": codes, "generator": generator.lazy_init(generator_key, codes)["params"]}


def generated(x: PyTree) -> Float[Array, "b h w c"]:
    """The images of a source's variables; all sizes of the generator show in its parameters."""
    params = x["generator"]
    height, width, first = params["project"]["bias"].shape
    hidden, colours = (params[name]["bias"].size for name in ("conv1", "conv2"))
    generator = Generator((height, width), (first, hidden), colours)
    images = generator.apply({"params": params}, x["latent"])
    return jax.device_put(images)


def not_in_quarters(shape: tuple[int, ...]) -> str | None:
    """Why images of this shape cannot be generated, or None."""
    height, width = shape[1:3]
    if height % UPSCALING == width % UPSCALING == 0:
        return None
    return (
        f"the generator makes images of sizes divisible by {UPSCALING}, and this network reads "
        f"{height}x{width} pixels. Import it with such a size (sizes divisible by {UPSCALING}; "
        "224 and 32 work), or use a method that optimises pixels."
    )
