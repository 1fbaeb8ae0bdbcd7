"""Lengths of time as people say them."""

MINUTE, HOUR, DAY = 60, 3600, 86400


def spoken(seconds: float) -> str:
    """A length of time in one or two units: `8 s`, `4 min`, `2 h 10 min`, `3 days`.

    Never more exact than an estimate is: seconds up to two minutes, minutes up to two hours.
    """
    if seconds < 2 * MINUTE:
        return f"{max(round(seconds), 1)} s"
    if seconds < 2 * HOUR:
        return f"{round(seconds / MINUTE)} min"
    if seconds < 2 * DAY:
        tens = round(seconds / (10 * MINUTE))
        hours, minutes = divmod(10 * tens, 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(seconds / DAY)} days"
