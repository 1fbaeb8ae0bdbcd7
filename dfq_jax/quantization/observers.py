"""The observers of a plan, and their names."""

from typing import NamedTuple

from dfq_jax.errors import PlanError, check_choice
from dfq_jax.numerics.ranges import (
    Aciq,
    EmaMinMax,
    Entropy,
    ImageMinMax,
    Lp,
    LpShift,
    MinMax,
    Observer,
    Omse,
    Percentile,
    Statistics,
)

DEFAULT_OBSERVER = Lp(2.4)
ACTIVATIONS_ONLY = (EmaMinMax, ImageMinMax, Statistics)


class Observers(NamedTuple):
    """How ranges are found.

    Attributes:
      weights: of kernels.
      activations: of everything else that is neither an image nor a constant.
    """

    weights: Observer = DEFAULT_OBSERVER
    activations: Observer = DEFAULT_OBSERVER


DEFAULT_OBSERVERS = Observers()
NAMED: dict[str, Observer] = {
    "min_max": MinMax(),
    "ema": EmaMinMax(),
    "image_min_max": ImageMinMax(),
    "percentile": Percentile(),
    "lp": Lp(),
    "lp_shift": LpShift(),
    "omse": Omse(),
    "aciq": Aciq(),
    "entropy": Entropy(),
    "statistics": Statistics(),
}


def observer_named(name: str) -> Observer:
    """The observer of that name, with its published settings.

    Raises:
      PlanError: if there is none; it says which there are.
    """
    check_choice("observer", name, NAMED, PlanError)
    return NAMED[name]


def check_observers(observers: Observers) -> None:
    """Refuses observers of weights that speak of batches or batch norms.

    Raises:
      PlanError: naming those that will do.
    """
    if isinstance(observers.weights, ACTIVATIONS_ONLY):
        fit = [n for n, kind in NAMED.items() if not isinstance(kind, ACTIVATIONS_ONLY)]
        raise PlanError(
            f"{observers.weights} says nothing of weights; their observers are {', '.join(fit)}."
        )
