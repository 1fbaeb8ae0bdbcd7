"""Pooling, reductions and resampling against PyTorch, over their attributes."""

from typing import Any

import numpy as np
import pytest
from drawn_networks import ROUTES, examples, space
from hypothesis import assume, given
from hypothesis import strategies as st

from dfq_jax.errors import UnsupportedModelError

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
pytestmark = pytest.mark.torch

FLAG = st.booleans()


def windows(draw: Any, rank: int) -> dict[str, Any]:
    kernel = space(draw, rank, 1, 4)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    stride = draw(st.sampled_from([None, space(draw, rank, 1, 3)]))
    return {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": draw(FLAG)}


@examples(30)
@given(st.data(), ROUTES)
def test_max_pool(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    pool = F.max_pool2d if rank == 2 else F.max_pool1d
    given = {**windows(draw, rank), "dilation": space(draw, rank, 1, 2)}
    assume(route[1] is None or max(given["dilation"]) == 1 or not given["ceil_mode"])
    kit.agree(
        lambda x: pool(x, **given), (draw(st.integers(1, 3)), *space(draw, rank, 7, 9)), route
    )


@examples(30)
@given(st.data(), ROUTES)
def test_average_pool(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    pool = F.avg_pool2d if rank == 2 else F.avg_pool1d
    given = {**windows(draw, rank), "count_include_pad": draw(FLAG)}
    assume(route[1] is None or not given["ceil_mode"])  # the exporter gives sizes of its own
    if rank == 2 and draw(FLAG) and route[1] is None:
        given["divisor_override"] = draw(st.integers(1, 5))
    kit.agree(
        lambda x: pool(x, **given), (draw(st.integers(1, 3)), *space(draw, rank, 4, 9)), route
    )


@examples(25)
@given(st.data(), ROUTES)
def test_adaptive_pools(kit, data, route):
    draw, rank = data.draw, data.draw(st.integers(1, 2))
    shape = (draw(st.integers(1, 3)), *space(draw, rank, 1, 8))
    largest = draw(FLAG)
    divide = largest or route[1] is not None
    wanted = []
    for n in shape[1:]:
        options = [o for o in range(1, n + 1) if n % o == 0 or not divide]
        wanted.append(draw(st.sampled_from([*options, *([None] if rank == 2 else [])])))
    kind = "max" if largest else "avg"
    pool = getattr(F, f"adaptive_{kind}_pool{rank}d")
    assume(route[1] is None or None not in wanted)
    kit.agree(lambda x: pool(x, tuple(wanted)), shape, route)


def test_adaptive_max_pool_of_unequal_windows_is_refused(kit):
    with pytest.raises(UnsupportedModelError, match="windows would differ in size"):
        kit.imported(lambda x: F.adaptive_max_pool2d(x, (2, 2)), (1, 5, 4))


@examples(30)
@given(st.data(), ROUTES)
def test_reductions(kit, data, route):
    draw = data.draw
    shape = space(draw, draw(st.integers(1, 3)), 1, 4)
    axes = sorted(draw(st.sets(st.integers(1, len(shape)), min_size=1)))
    axes = [a - len(shape) - 1 if draw(FLAG) else a for a in axes]
    keep, kind = draw(FLAG), draw(st.sampled_from(["mean", "sum", "amax", "norm"]))
    reduce = torch.linalg.vector_norm if kind == "norm" else getattr(torch, kind)

    def function(x: Any) -> Any:
        y = reduce(x, dim=axes, keepdim=keep)
        return x - y if keep else y

    kit.agree(function, shape, route)


def test_a_reduction_over_everything_is_refused(kit):
    with pytest.raises(UnsupportedModelError, match="over all axes, the batch among them"):
        kit.imported(lambda x: x + x.mean(), (2, 3, 4))


@examples(40)
@given(st.data(), ROUTES)
def test_interpolation(kit, data, route):
    draw = data.draw
    shape = (draw(st.integers(1, 2)), *space(draw, 2, 2, 7))
    mode = draw(st.sampled_from(["nearest", "bilinear", "bicubic", "nearest-exact"]))
    given: dict[str, Any] = {"mode": mode}
    if mode.startswith("bi"):
        given["align_corners"] = draw(FLAG)
    if draw(FLAG):
        given["size"] = space(draw, 2, 1, 12)
    else:
        factors = st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.3, 3.0, 1.3, 0.7])
        given["scale_factor"] = (draw(factors), draw(factors))
        given["recompute_scale_factor"] = draw(st.sampled_from([None, True]))
    assume(route[1] is None or mode != "nearest-exact")
    pairs = zip(shape[1:], given.get("scale_factor", ()), strict=False)
    copied = any(int(n * s) in (n, 2 * n) and s not in (1, 2) for n, s in pairs)
    assume(route[1] is None or not copied)  # PyTorch ignores the scale, other runtimes do not
    try:
        kit.agree(lambda x: F.interpolate(x, **given), shape, route)
    except UnsupportedModelError as error:
        assume("resizing with linear, pytorch_half_pixel" not in str(error))  # to one pixel
        raise


@examples(15)
@given(st.data(), ROUTES)
def test_shuffles(kit, data, route):
    draw = data.draw
    r, (c, h, w) = draw(st.integers(1, 3)), space(draw, 3, 1, 3)
    kind = draw(st.sampled_from(["pixel", "back", "channel"]))
    assume(route[1] is None or kind != "channel")
    shapes = {"pixel": (c * r * r, h, w), "back": (c, h * r, w * r), "channel": (c * r, h, w)}
    functions = {
        "pixel": lambda x: F.pixel_shuffle(x, r),
        "back": lambda x: F.pixel_unshuffle(x, r),
        "channel": lambda x: torch.channel_shuffle(x, r),
    }
    kit.agree(lambda x: functions[kind](x) + 1, shapes[kind], route)


def test_pooled_windows_average_the_image(kit):
    found = kit.imported(nn.AdaptiveAvgPool2d((2, 1)), (1, 4, 6))
    x = np.arange(24, dtype=np.float32).reshape(1, 1, 4, 6)
    (y,) = kit.outputs_of(found, x)
    np.testing.assert_allclose(y[0, 0, :, 0], [x[0, 0, :2].mean(), x[0, 0, 2:].mean()])
