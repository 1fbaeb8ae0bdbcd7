"""What is told of a unit whose rounding was learned."""

from typing import NamedTuple


class UnitReport(NamedTuple):
    """How a unit fared.

    Attributes:
      name: of its first layer, and how many more.
      method: that was applied.
      before: the method's loss between its outputs, from quantized inputs, and the float unit's, as
        the unit came: rounded to nearest, or by an earlier method; in closed form the squared error
        in units of the output's power.
      after: the same with what was learned.
      kept: whether that was better, and kept.
      seconds: spent.
      notes: what went wrong on the way, in words that follow its name.
    """

    name: str
    method: str
    before: float
    after: float
    kept: bool
    seconds: float
    notes: tuple[str, ...] = ()
