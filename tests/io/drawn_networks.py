"""What tests of importers draw: ways of export, sizes, and how many examples of them."""

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

ROUTES = st.tuples(
    st.sampled_from([1, 4, None]), st.sampled_from([None, None, None, 11, 13, 17, 20])
)
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


def examples(count: int) -> Any:
    return settings(
        max_examples=int(os.environ.get("DFQ_EXAMPLES", count)),
        deadline=None,
        derandomize="DFQ_EXAMPLES" not in os.environ,
        database=None,
        phases=(Phase.explicit, Phase.generate),  # each export is slow: no shrinking
        report_multiple_bugs=False,
        suppress_health_check=SLOW,
    )


def space(draw: Any, rank: int, least: int, most: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(least, most)) for _ in range(rank))
