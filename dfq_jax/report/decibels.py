"""Ratios of signal to noise as people read them, those among them that are no plain number."""

import math

SILENT = -100.0
"""SQNR in dB below which there is no signal: the float network gives 0 there."""


def in_decibels(ratio: float) -> str:
    """A ratio in a sentence: `31.2 dB`, `infinite (no difference)`, ...

    Args:
      ratio: in dB; infinite without noise, no number or minus infinity where something is not
        finite.
    """
    return unusual(ratio, "infinite (no difference)", "undefined (0 in float)") or f"{ratio:.1f} dB"


def decibel_cell(ratio: float) -> str:
    """The same in a cell of a table whose head says dB."""
    return unusual(ratio, "exact", "0 in float") or f"{ratio:.1f}"


def unusual(ratio: float, exact: str, silent: str) -> str:
    """What stands for a ratio that is no plain number; nothing for one that is.

    Args:
      ratio: in dB.
      exact: words for no noise.
      silent: words for no signal.
    """
    if math.isnan(ratio) or ratio == -math.inf:
        return "not finite"
    if ratio == math.inf:
        return exact
    return silent if ratio < SILENT else ""


def share_of_error(ratio: float) -> float:
    """Root mean square of the error over that of the signal, of a ratio in dB."""
    return 0.0 if ratio == math.inf else 10 ** (-ratio / 20)
