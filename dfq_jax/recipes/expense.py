"""What making images is expected to take: in words, before it is done."""

import math
import time

import jax
import jax.numpy as jnp
import numpy as np

from dfq_jax.base.durations import spoken
from dfq_jax.graph.graph import Model
from dfq_jax.graph.query import macs
from dfq_jax.recipes.presets import ImageBudget, budget_of_method, offer_of, recipe_for
from dfq_jax.synthesis.recipe import Recipe, batch_size
from dfq_jax.synthesis.terms.targets import recorded_statistics

PASSES = 3
"""Passes through a network in one step: forward, and backward at twice the work."""
SHARE = 0.6
"""Of the speed at which matrices are multiplied, what steps of synthesis reach: on one CPU core 0.4
was measured on EfficientNet-lite0, with depthwise layers, and 1.0 on ResNet-20, with tiles."""
SIDE = 512
LONG = 60.0
"""Seconds from which on it is said how long making images takes."""


def manner(model: Model, method: str | Recipe, budget: ImageBudget, preset: str) -> str:
    """How images of a method are made, in words, and where its numbers are from."""
    recipe = recipe_for(method, model=model)
    batch = min(batch_size(recipe, budget.n, len(recorded_statistics(model)[0]) or 1), budget.n)
    many = math.ceil(budget.n / batch)
    batches = f"{many} batches of {batch} images" if many > 1 else f"one batch of {batch} images"
    each = " each" if many > 1 else ""
    return f"{batches}, {budget.steps:,} steps{each}{origin(method, model, budget, preset)}"


def length(model: Model, budget: ImageBudget) -> str:
    """How long that takes, to be said behind it; empty where it is not long."""
    seconds = expected_seconds(model, budget)
    if seconds < LONG:
        return ""
    return f"; roughly {spoken(seconds)} on this machine, less with smaller `n=` and `steps=`"


def origin(method: str | Recipe, model: Model, budget: ImageBudget, preset: str) -> str:
    """Where numbers of images and steps come from, and what they would be otherwise."""
    if isinstance(method, Recipe):
        return ""
    own = budget_of_method(method, model)
    same, ours = (budget.n, budget.steps) == (own.n, own.steps), offer_of(method).ours
    if same:
        return "" if ours else ", as published"
    told = f"{own.n:,} images in {own.steps:,} steps"
    if ours:
        cut = "" if budget.named else f" for preset {preset}"
        return f"{cut}; by itself {method} makes {told}"
    return f"; published are {told}"


def expected_seconds(model: Model, budget: ImageBudget, rate: float | None = None) -> float:
    """What optimising images takes on this machine, roughly: compiling apart, by products alone.

    Args:
      model: the network.
      budget: how many images and steps.
      rate: multiply-accumulates a second; None to find out.
    """
    work = PASSES * sum(macs(model).values()) * budget.n * budget.steps
    return work / (SHARE * speed() if rate is None else rate)


def speed() -> float:
    """Multiply-accumulates a second of this machine, of matrices."""
    matrix, product = jax.device_put(np.ones((SIDE, SIDE), np.float32)), jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return SIDE**3 / min(seconds)
