"""Images that judge every quantized form of a network alike, made from the network alone.

Half of the base images have labels, and the network is sure of them: their features are as strong
as those of photographs, so clipped ranges show. The other half have none, and decisions about them
are close. They are one batch, with the statistics the network was trained on. What lies between,
where most photographs are, costs no optimisation: blended, moved and flipped images, of more or
less contrast.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from dfq_jax.base.parallel import Machine
from dfq_jax.examples import Examples, evidence_in
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import weights_sha256
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.optim.state import NOWHERE, Place
from dfq_jax.recipes.presets import choice_for
from dfq_jax.recipes.sizes import is_small
from dfq_jax.synthesis.recipe import half_labelled
from dfq_jax.synthesis.run.engine import synthesize_images
from dfq_jax.synthesis.sources.pixels import from_pixels, to_pixels
from dfq_jax.types import InputContract

PROBES = 256
SEED = 20240
"""Of every network's probes, whatever the seed of a run: a network has one set."""
SMALL_BASE, LARGE_BASE = (64, 100), (16, 40)
"""Base images and steps where images are small, and where they are large."""
MOVED = 7
"""Images move by up to this part of their side, around the edges."""
CONTRASTS = (0.4, 1.3)


def base_of(model: Model) -> tuple[int, int]:
    """Base images of a network's probes, and steps that these take."""
    return SMALL_BASE if is_small(model.contract) else LARGE_BASE


def probes_of(
    model: Model,
    *,
    n: int = PROBES,
    memory: int | None = None,
    watch: Watcher = SILENT,
    place: Place = NOWHERE,
) -> Examples:
    """The probes of a network: equal for every scheme, preset, method and seed of a run.

    Args:
      model: network with its batch norms in place.
      n: how many, base images included.
      memory: bytes a step may take.
      watch: told how their making advances.
      place: keeps state here and resumes from it.

    Returns:
      8-bit pixels as network input; noise, which their evidence says, for a network without
      batch-norm statistics.
    """
    base, steps = base_of(model)
    choice = choice_for(model, "best", steps, min(base, n))
    noise = choice.recipe.name == "noise"
    recipe = choice.recipe if noise else choice.recipe._replace(condition=half_labelled)
    facts: dict[str, Any] = {
        "method": recipe.name,
        "seed": SEED,
        "n": n,
        "base": n if noise else min(base, n),
    }
    made = synthesize_images(
        choice.model,
        recipe,
        facts["base"],
        jax.random.key(SEED),
        machine=Machine(memory=memory),
        watch=watch,
        place=place.knowing(
            facts | {"steps": recipe.steps, "weights_sha256": weights_sha256(model)}
        ),
    )
    return probes_from(to_pixels(made.images, model.contract), model.contract, facts)


def probes_from(
    pixels: UInt8[np.ndarray, "base h w c"],
    contract: InputContract,
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> Examples:
    """The whole set of probes from its base images, as an output folder keeps them.

    Args:
      pixels: base images.
      contract: of their network.
      facts: provenance; `n` is how many probes to make of them.
    """
    whole = np.concatenate([pixels, varied(pixels, facts.get("n", PROBES) - len(pixels))])
    images = from_pixels(whole, contract)
    return Examples((images,), (contract,), dict(facts), evidence_in(facts))


def base_pixels(probes: Examples) -> UInt8[np.ndarray, "base h w c"]:
    """The base images of a set of probes; all of one that is noise."""
    count = probes.provenance.get("base", len(probes))
    return to_pixels(probes.images[:count], probes.contract)


def varied(pixels: UInt8[np.ndarray, "base h w c"], n: int) -> UInt8[np.ndarray, "n h w c"]:
    """So many variations of base images, in a fixed order of random choices."""
    random = np.random.default_rng(SEED)
    made = [variation(pixels, index % 2 == 1, random) for index in range(n)]
    return np.stack(made) if made else pixels[:0]


def variation(
    pixels: UInt8[np.ndarray, "base h w c"], moved: bool, random: np.random.Generator
) -> UInt8[np.ndarray, "h w c"]:
    """Two base images blended; if `moved`, also shifted, flipped by chance, of other contrast."""
    first, second = random.permutation(len(pixels))[:2] if len(pixels) > 1 else (0, 0)
    share = random.uniform(0.5, 1)
    image = share * pixels[first].astype(np.float32) + (1 - share) * pixels[second]
    if moved:
        height, width = (size // MOVED for size in image.shape[:2])
        steps = random.integers(-height, height + 1), random.integers(-width, width + 1)
        image = np.roll(image[:, :: random.choice((-1, 1))], steps, (0, 1))
        grey = image.mean()
        image = grey + (image - grey) * random.uniform(*CONTRASTS)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
