"""What a machine cannot hold, refused before anything of it is allocated."""

import os

import jax

from dfq_jax.errors import ResourceError
from dfq_jax.synthesis.recipe import Recipe
from dfq_jax.synthesis.run.memory import in_units
from dfq_jax.types import tree_bytes


def least_bytes(recipe: Recipe, shape: tuple[int, ...], turns: int = 1) -> int:
    """Bytes one optimisation holds at the least, whatever the network.

    Args:
      recipe: the method.
      shape: of a batch of images, float32.
      turns: batches that take turns in it.

    Returns:
      Variables, their gradient, the largest optimizer state of any stage, and the images.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    x = jax.eval_shape(lambda key: recipe.source.init(key, shape), key)
    variables, images = tree_bytes(x), tree_bytes(jax.ShapeDtypeStruct(shape, "float32"))
    states = [tree_bytes(jax.eval_shape(stage.optimizer(1.0).init, x)) for stage in recipe.stages]
    gradient = variables if states else 0
    return turns * (variables + images + max(states, default=0)) + gradient


def bytes_here() -> int | None:
    """Memory of all devices of this process together, or of the machine; None if unknown."""
    told = [device.memory_stats() for device in jax.local_devices()]
    if all(stats and "bytes_limit" in stats for stats in told):
        return sum(stats["bytes_limit"] for stats in told if stats)
    return host_bytes()


def host_bytes() -> int | None:
    """Memory of the machine; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def refuse_hopeless(recipe: Recipe, shape: tuple[int, ...], turns: int = 1) -> None:
    """Raises ResourceError for batches of images that cannot fit into memory, with the bytes.

    It looks at shapes only. What passes may still be too much: activations come on top.
    """
    needed, there = least_bytes(recipe, shape, turns), bytes_here()
    if there is not None and needed > there:
        batch, height, width = shape[:3]
        raise ResourceError(
            f"{recipe.name}: {turns * batch} images of {height}x{width} pixels at a time need at "
            f"least {in_units(needed)} of memory ({needed} bytes), and there are "
            f"{in_units(there)}. Import the network with a smaller size, or use a smaller `batch=` "
            "or `n=`."
        )
