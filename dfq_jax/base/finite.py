"""Numbers that are not finite, left out of plain data: JSON has none."""

import math
from typing import Any


def finite_or_none(x: float) -> float | None:
    """For JSON, which has neither NaN nor infinity."""
    return x if math.isfinite(x) else None


def finite_data(data: Any) -> Any:
    """Plain JSON data with None in place of every number that is not finite."""
    match data:
        case float():
            return finite_or_none(data)
        case dict():
            return {key: finite_data(value) for key, value in data.items()}
        case list() | tuple():
            return [finite_data(value) for value in data]
        case _:
            return data
