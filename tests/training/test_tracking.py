"""Ranges of activations follow the images of the first steps."""

import jax.numpy as jnp
import numpy as np

from dfq_jax.training.tracking import Tracking, tracked, tracked_at_first


def begun_ranges(tracking, quantized):
    inputs = quantized.model.graph.inputs
    return tracked_at_first(tracking, quantized.plan, quantized.qparams, inputs)


def test_ranges_follow_the_first_images(calibrated):
    quantized, tracking = calibrated("w4a4"), Tracking(2, 0.9)
    ranges = begun_ranges(tracking, quantized)
    assert ranges
    name = next(iter(ranges))
    seen = lambda top: {n.split(":", 1)[1]: (jnp.zeros(()), jnp.float32(top)) for n in ranges}
    first = tracked(tracking, ranges, seen(2.0), jnp.int32(0))
    second = tracked(tracking, first, seen(3.0), jnp.int32(1))
    third = tracked(tracking, second, seen(9.0), jnp.int32(2))
    tops = [float(r[name][1]) for r in (first, second, third)]
    np.testing.assert_allclose(tops, [2.0, 2.1, 2.1], rtol=1e-6)


def test_ranges_widen_to_all_that_the_first_images_show(calibrated):
    """QuantFace's: smallest and largest of the first steps, whatever calibration found."""
    quantized, tracking = calibrated("w4a4"), Tracking(3, None)
    ranges = begun_ranges(tracking, quantized)
    shown = [(-1.0, 2.0), (-3.0, 1.0), (0.0, 2.5), (-9.0, 9.0)]
    seen = lambda low, top: {
        n.split(":", 1)[1]: (jnp.float32(low), jnp.float32(top)) for n in ranges
    }
    found = []
    for step, ends in enumerate(shown):
        ranges = tracked(tracking, ranges, seen(*ends), jnp.int32(step))
        found.append(tuple(float(end) for end in next(iter(ranges.values()))))
    assert found == [(-1.0, 2.0), (-3.0, 2.0), (-3.0, 2.5), (-3.0, 2.5)]
