"""Learning-rate rules that react to the loss, as optax transforms that live inside the scan."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dfq_jax.values import Bound, bound


class PlateauState(NamedTuple):
    """Factor in force, best loss so far, steps since it improved."""

    scale: Float[Array, ""]
    best: Float[Array, ""]
    bad: Int[Array, ""]


Make = Callable[..., optax.GradientTransformation]
"""An optimizer's factory, whose first argument is the learning rate."""


def rated(make: Make, learning_rate: float, **settings: Any) -> Bound[optax.GradientTransformation]:
    """factor -> an optimizer at so much of its learning rate.

    Args:
      make: a factory of a module, e.g. `optax.adam`.
      learning_rate: its first argument, at a factor of 1.
      **settings: its other arguments.
    """
    return bound(at_rate, make, learning_rate, tuple(sorted(settings.items())))


def at_rate(
    make: Make, learning_rate: float, settings: tuple[tuple[str, Any], ...], factor: float
) -> optax.GradientTransformation:
    """What `rated` gives for a factor."""
    return make(learning_rate * factor, **dict(settings))


def in_own_units() -> optax.GradientTransformation:
    """Updates in units of the size of what they change: a scale then never changes its sign."""
    sized = lambda update, value: update * jnp.abs(value)
    return optax.stateless(lambda updates, params: jax.tree.map(sized, updates, params))


def adam_to_zero(
    learning_rate: float, *, steps: int, b1: float = 0.9, b2: float = 0.999, warmup: int = 0
) -> optax.GradientTransformation:
    """Adam whose rate falls to 0 along a cosine, after it rose for some steps (`warmup_cosine`)."""
    return optax.adam(warmup_cosine(learning_rate, steps, warmup), b1, b2)


def adam_with_plateau(
    learning_rate: float, *, patience: int, floor: float, factor: float = 0.1
) -> optax.GradientTransformationExtraArgs:
    """Adam whose rate falls by `factor` on plateaus, to `floor` at the least (both absolute)."""
    rule = reduce_on_plateau(factor=factor, patience=patience, floor=floor / learning_rate)
    return optax.chain(optax.adam(learning_rate), rule)


def radam_with_plateau(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """RAdam, halved on plateaus down to 1e-4; each cut forgets the best loss so far."""
    rule = reduce_on_plateau(
        factor=0.5, patience=steps // 50, floor=1e-4 / learning_rate, forget=True
    )
    return optax.chain(optax.radam(learning_rate), rule)


def reduce_on_plateau(
    *,
    factor: float = 0.1,
    patience: int = 100,
    threshold: float = 1e-4,
    floor: float = 0.0,
    forget: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Scales updates down whenever the loss has stopped improving.

    A step is bad unless `loss < best * (1 - threshold)`. After `patience + 1` bad steps in a row
    the scale is multiplied by `factor`, effective from the next step, and the count restarts.

    Args:
      factor: in (0, 1).
      patience: bad steps tolerated.
      threshold: relative improvement that counts.
      floor: smallest scale, relative to the initial learning rate.
      forget: drop the best loss with every cut, so that the next one counts as an improvement.

    Returns:
      A transform whose `update` needs `value=loss`.

    Raises:
      ValueError: if `factor` is not in (0, 1).

    Reference:
      `torch.optim.lr_scheduler.ReduceLROnPlateau` in mode "min" with relative threshold; `forget`
      as in Dikstein et al. 2025, "Data Generation for Hardware-Friendly Post-Training
      Quantization", released code.
    """
    if not 0 < factor < 1:
        raise ValueError(f"reduce_on_plateau() needs 0 < factor < 1, got {factor}.")

    def init(params) -> PlateauState:
        del params
        return PlateauState(
            jnp.ones(()), jnp.full((), jnp.inf, jnp.float32), jnp.zeros((), jnp.int32)
        )

    def update(updates, state, params=None, **extra):
        del params
        value = extra["value"]
        updates = jax.tree.map(lambda u: u * state.scale, updates)
        improved = value < state.best * (1 - threshold)
        bad = jnp.where(improved, 0, state.bad + 1)
        fire = bad > patience
        lower = jnp.maximum(state.scale * factor, jnp.minimum(floor, state.scale))
        scale = jnp.where(fire, lower, state.scale)
        best = jnp.where(improved, value, state.best)
        best = jnp.where(fire, jnp.inf, best) if forget else best
        return updates, PlateauState(scale, best, jnp.where(fire, 0, bad))

    return optax.GradientTransformationExtraArgs(init, update)


def warmup_cosine(learning_rate: float, steps: int, warmup: int = 100) -> optax.Schedule:
    """A rate that rises in equal steps to `learning_rate`, then falls to 0 along a cosine.

    Args:
      learning_rate: reached at step `warmup - 1`, held for one step more.
      steps: of the whole run; the rate would be 0 one step after the last.
      warmup: steps of the rise, at most half of all; fewer than 2 are none.

    Returns:
      step -> rate.

    Reference:
      Yin et al. 2020, "Dreaming to Distill", released code.
    """
    warmup = min(warmup, steps // 2)
    if warmup < 2:
        return optax.cosine_decay_schedule(learning_rate, steps)
    fall = optax.cosine_decay_schedule(learning_rate, steps - warmup)
    rise = optax.linear_schedule(learning_rate / warmup, learning_rate, warmup - 1)
    return optax.join_schedules([rise, fall], [warmup])
