"""Predicted ranges where 8 bits lose least: inside those of six deviations, of all operators."""

import numpy as np
import pytest

from dfq_jax.graph.ops import PRelu
from dfq_jax.numerics.tails import least_lossy_range
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.passes.ranges import expected_ranges
from dfq_jax.passes.thrifty_ranges import thrifty_ranges
from dfq_jax.types import InputContract

ends = lambda found: {name: (float(low), float(high)) for name, (low, high) in found.items()}


def test_inside_those_of_six_deviations(tiny_net):
    model = fold_batch_norm(tiny_net)
    wide, found = ends(expected_ranges(model)), ends(thrifty_ranges(model))
    assert found.keys() == wide.keys()
    for name, (low, high) in found.items():
        assert wide[name][0] - 1e-6 <= low <= high <= wide[name][1] + 1e-6, name
    assert found["maxpool"] == found["relu3"]  # a pool has the values that it reads
    assert found["relu1"][0] == 0


def test_slopes_and_statistics_of_each_channel_decide(nets):
    """Behind a PReLU the ends are those of NumPy, and far from the widest channel's."""
    b = nets.Builder(InputContract(6, 6), seed=3)
    b.op("act", PRelu(), b.bn("bn", b.conv("conv", "images", 48)), slope=b.rng.uniform(0, 1, 48))
    b.params["bn"]["scale"][1] = 12.0
    model = fold_batch_norm(b.done(b.linear("end", "act", 2)))
    wide, found = ends(expected_ranges(model)), ends(thrifty_ranges(model))
    moments = model.moments["conv"]
    mean, deviation = np.asarray(moments.mean), np.sqrt(np.asarray(moments.var))
    slope = np.asarray(model.params["act"]["slope"])
    wanted = least_lossy_range(mean, deviation, wide["act"], slope)
    assert found["act"] == pytest.approx(wanted, rel=1e-6)
    assert found["act"][1] < 0.9 * wide["act"][1]
