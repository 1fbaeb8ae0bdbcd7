"""The rules of verification: what may differ by how much, and what is said if it does not hold."""

import math
from collections.abc import Sequence

from scipy.special import fdtri

from dfq_jax.io.onnx.builder import printable
from dfq_jax.io.runtime.session import PRECISE as SWITCH
from dfq_jax.io.runtime.session import SATURATES
from dfq_jax.io.verification.ends import OutputCheck
from dfq_jax.io.verification.layers import LayerCheck
from dfq_jax.io.verification.runners import ON, PRECISE

MOST_STEPS = 1
"""Codes of two exact computations differ by a step where a value is a tie, and never by two."""

MOST_BEYOND = 0.1
"""How far from a tie, in steps, such a value may lie: what float sums err by."""

MOST_OF_RANGE = 1e-5
"""What they err by as a share of the codes there are, which is more than that on 16 bits."""

APART = 2 * math.sqrt(2)
"""Limit of a difference in units of noise, where many values are compared.

Two exact roundings that have nothing in common differ by `sqrt(2)` units; twice that is a fault.
"""

CHANCE = 1e-6
"""How often noise that is measured on few values may fail a file by chance."""

INDEPENDENT = 8
"""As how many values those of one image count at most: they hang together."""

NOTICED = 0.1
"""From how many units of noise on it is worth telling that saturation moves an output."""

LEAST_AGREEMENT = 0.99
"""Share of the decisions that count which must be the simulator's."""


def judged_by(names: Sequence[str]) -> tuple[str, ...]:
    """Which of the ways to run a network decide: all, less the one that may saturate."""
    return tuple(name for name in names if name != ON or PRECISE not in names)


def failures_of(
    damage: Sequence[str],
    layers: Sequence[LayerCheck],
    outputs: Sequence[OutputCheck],
    judged: Sequence[str],
) -> tuple[str, ...]:
    """The rules that are broken, a sentence each.

    Args:
      damage: what in the file is not as the exporter writes it.
      layers: the comparison by layer.
      outputs: the comparison by output.
      judged: the ways to run the network that decide.
    """
    return (
        *broken_file(damage),
        *broken_layers(layers),
        *(told for output in outputs for told in broken_output(output, judged)),
    )


def broken_file(damage: Sequence[str]) -> list[str]:
    """A sentence if constants or nodes are not those of the network."""
    more = f", and {len(damage) - 1} more" if len(damage) > 1 else ""
    return [f"the file is not what was exported: {damage[0]}{more}"] if damage else []


def broken_layers(layers: Sequence[LayerCheck]) -> list[str]:
    """A sentence naming the first tensor whose codes differ by more than ties."""
    for layer in layers:
        tensor = printable(layer.tensor)
        if layer.steps > MOST_STEPS:
            return [f"the codes of {tensor!r} are up to {layer.steps} steps apart, 1 is allowed"]
        most = max(MOST_BEYOND, MOST_OF_RANGE * 2**layer.bits)
        if not layer.beyond <= most:
            return [
                f"codes of {tensor!r} differ that are no ties: up to {layer.beyond:.2g} steps off, "
                f"{most:.2g} are allowed"
            ]
    return []


def broken_output(output: OutputCheck, judged: Sequence[str]) -> list[str]:
    """A sentence for every rule an output breaks, with the worst of the ways to run it."""
    name, told = printable(output.name), []
    limit = most_noise(output.images, output.values)
    worst = max(judged, key=lambda way: noise_key(output.differences[way]))
    if not output.differences[worst] <= limit:
        told.append(
            f"output {name!r} ({worst}) is {output.differences[worst]:.2g} times the noise of "
            f"rounding from the simulator, up to {limit:.2g} is allowed"
        )
    worst = min(judged, key=lambda way: output.agreements[way])
    if output.agreements[worst] < LEAST_AGREEMENT:
        told.append(
            f"output {name!r} ({worst}) decides as the simulator in only "
            f"{100 * output.agreements[worst]:.1f} % of {output.counted} cases that are no ties"
        )
    return told


def noise_key(difference: float) -> float:
    """For comparing differences, of which no number is the largest."""
    return math.inf if math.isnan(difference) else difference


def most_noise(images: int, values: int) -> float:
    """How many units of noise an output may differ by.

    The unit is itself measured, on so many images of so many values. The ratio of two such mean
    squares follows the F distribution; its upper end at `CHANCE` is added to the limit.
    """
    count = images * min(values, INDEPENDENT)
    return APART * math.sqrt(float(fdtri(count, count, 1 - CHANCE)))


def moved_by_saturation(outputs: Sequence[OutputCheck]) -> tuple[str, ...]:
    """The warning that products saturate on this processor, where that moves an output."""
    compared = [o for o in outputs if PRECISE in o.differences]
    moved = [o for o in compared if not o.differences[ON] <= o.differences[PRECISE] + NOTICED]
    if not moved:
        return ()
    most = max(moved, key=lambda o: noise_key(o.differences[ON]))
    classes = (
        f" and decides otherwise in {100 * (1 - most.agreements[ON]):.1f} % of clear cases"
        if most.agreements[ON] < 1
        else ""
    )
    return (
        f"{SATURATES}Here that moves output {printable(most.name)!r} by {most.differences[ON]:.2g} "
        f"times the noise of rounding ({most.differences[PRECISE]:.2g} in precise mode)"
        f"{classes}. The file is judged without it, as other processors compute it. To avoid it "
        f'here: session option {SWITCH} = "1", or kernels of at most 7 bits '
        "(w8a8: the rule '*=w7').",
    )
