"""Views: chains of them before a layer keep the function, and leave no transposes behind."""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
from drawn_networks import ROUTES, examples
from hypothesis import assume, given
from hypothesis import strategies as st

from dfq_jax.errors import UnsupportedModelError

torch = pytest.importorskip("torch")
F = torch.nn.functional
pytestmark = pytest.mark.torch

Step = Callable[[Any], Any]
Sizes = list[int]


def constant(*shape: int, seed: int = 1) -> Any:
    values = np.random.default_rng(seed).uniform(0.5, 1.5, size=shape)
    return torch.from_numpy(values.astype(np.float32))


def factors(draw: Any, total: int) -> Sizes:
    """Sizes of one to four axes with `total` values."""
    sizes = []
    for _ in range(draw(st.integers(0, 3))):
        options = [d for d in range(1, total + 1) if total % d == 0]
        sizes.append(draw(st.sampled_from(options)))
        total //= sizes[-1]
    at = draw(st.integers(0, len(sizes)))
    return [*sizes[:at], total, *sizes[at:]]


def reshape(draw: Any, s: Sizes) -> Step:
    new = factors(draw, prod(s))
    return lambda x: x.reshape(x.shape[0], *new)


def view_minus_one(draw: Any, s: Sizes) -> Step:
    new = factors(draw, prod(s))
    return lambda x: x.contiguous().view(-1, *new)


def permute(draw: Any, s: Sizes) -> Step:
    order = draw(st.permutations(range(1, len(s) + 1)))
    return lambda x: x.permute(0, *order)


def transpose(draw: Any, s: Sizes) -> Step:
    a, b = (draw(st.integers(1, len(s))) for _ in range(2))
    b = b - len(s) - 1 if draw(st.booleans()) else b
    return lambda x: x.transpose(a, b)


def unsqueeze(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s) + 1))
    return lambda x: x.unsqueeze(at)


def squeeze(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    return lambda x: x.squeeze(at) if len(s) > 1 == s[at - 1] else x


def flatten(draw: Any, s: Sizes) -> Step:
    first = draw(st.integers(1, len(s)))
    last = draw(st.integers(first, len(s)))
    return lambda x: x.flatten(first, last)


def unflatten(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    new = factors(draw, s[at - 1])
    new[draw(st.integers(0, len(new) - 1))] = -1
    return lambda x: x.unflatten(at, new)


def slice_(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    start = draw(st.integers(-s[at - 1], s[at - 1] - 1))
    stop = draw(st.integers(start % s[at - 1] + 1, s[at - 1] + 1))
    step = draw(st.integers(1, 2))
    return lambda x: x[(slice(None),) * at + (slice(start, stop, step),)]


def select(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    index = draw(st.integers(-s[at - 1], s[at - 1] - 1))
    return lambda x: x.select(at, index) if len(s) > 1 else x


def narrow(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    start = draw(st.integers(0, s[at - 1] - 1))
    length = draw(st.integers(1, s[at - 1] - start))
    return lambda x: x.narrow(at, start, length)


def chunk(draw: Any, s: Sizes) -> Step:
    at, count, last = draw(st.integers(1, len(s))), draw(st.integers(1, 3)), draw(st.booleans())
    return lambda x: x.chunk(count, at)[-1 if last else 0]


def split(draw: Any, s: Sizes) -> Step:
    at, size = draw(st.integers(1, len(s))), draw(st.integers(1, 4))
    return lambda x: torch.cat(x.split(size, at)[::-1], at)


def split_sizes(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    cut = draw(st.integers(0, s[at - 1]))
    if cut in (0, s[at - 1]):
        return lambda x: x
    return lambda x: torch.split(x, [cut, s[at - 1] - cut], at)[1]


def unbind(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    if len(s) == 1 or s[at - 1] > 4:
        return lambda x: x
    return lambda x: x.unbind(at)[0] - 2 * x.unbind(at)[-1]


def roll(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    shift = draw(st.integers(1 - s[at - 1], s[at - 1] - 1))  # the ONNX exporter needs it that small
    return lambda x: x.roll(shift, at)


def flip(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    return lambda x: x.flip(at)


def expand(draw: Any, s: Sizes) -> Step:
    at, size = draw(st.integers(1, len(s) + 1)), draw(st.integers(1, 3))
    wanted = [*s[: at - 1], size, *s[at - 1 :]]
    return lambda x: x.unsqueeze(at).expand(-1, *wanted)


def repeat(draw: Any, s: Sizes) -> Step:
    counts = [draw(st.integers(1, 2)) for _ in s]
    return lambda x: x.repeat(1, *counts)


def cat(draw: Any, s: Sizes) -> Step:
    at, seed = draw(st.integers(1, len(s))), draw(st.integers(0, 9))
    first = draw(st.booleans())
    more = constant(1, *s, seed=seed)

    def step(x: Any) -> Any:
        beside = more.expand(x.shape[0], *s)
        return torch.cat([beside, x] if first else [x, beside, 2 * x], at)

    return step


def stack_swapped(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s) + 1))
    equal = [(i, j) for i in range(len(s)) for j in range(i) if s[i] == s[j]]
    if not equal:
        return lambda x: x
    i, j = draw(st.sampled_from(equal))
    return lambda x: torch.stack([x, x.transpose(i + 1, j + 1)], at)


def add_swapped(draw: Any, s: Sizes) -> Step:
    equal = [(i, j) for i in range(len(s)) for j in range(i) if s[i] == s[j]]
    if not equal:
        return lambda x: x
    i, j = draw(st.sampled_from(equal))
    return lambda x: x - x.transpose(i + 1, j + 1) / 3


def outer(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    return lambda x: x.unsqueeze(at) - 2 * x.unsqueeze(at + 1)


def scaled(draw: Any, s: Sizes) -> Step:
    some = constant(*[n if draw(st.booleans()) else 1 for n in s])
    return lambda x: x * some + 1


def softmax(draw: Any, s: Sizes) -> Step:
    at = draw(st.integers(1, len(s)))
    return lambda x: x.softmax(at)


def pad(draw: Any, s: Sizes) -> Step:
    widths = [draw(st.integers(0, 1)) for _ in range(2 * min(len(s), 2))]
    return lambda x: F.pad(x, widths, value=0.5)


def tanh(draw: Any, s: Sizes) -> Step:
    return torch.tanh


VIEWS = (
    *(reshape, view_minus_one, permute, transpose, unsqueeze, squeeze, flatten, unflatten, slice_),
    *(select, narrow, chunk, split, split_sizes, unbind, roll, flip, expand, repeat, cat),
    *(stack_swapped, add_swapped, outer, scaled, softmax, pad, tanh),
)


def linear(s: Sizes) -> Step:
    weight, bias = constant(3, s[-1]) - 1, constant(3)
    return lambda x: F.linear(x, weight, bias)


def convolution(s: Sizes) -> Step:
    kernel = constant(2, s[0], *(1,) * (len(s) - 1), seed=2) - 1
    return (lambda x: F.conv2d(x, kernel)) if len(s) == 3 else (lambda x: F.conv1d(x, kernel))


@st.composite
def chains(draw: Any) -> tuple[tuple[int, ...], Step]:
    """Shape of one image, and a function of 3 to 6 views and a layer."""
    shape = tuple(draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 3))))
    steps, sizes = [], list(shape)
    for _ in range(draw(st.integers(3, 6))):
        step = draw(st.sampled_from(VIEWS))(draw, sizes)
        made = list(step(torch.zeros(2, *sizes)).shape[1:])
        if made and prod(made) <= 200 and len(made) < 6:
            steps.append(step)
            sizes = made
    end = draw(st.sampled_from([linear, convolution, None]))
    if end is not None and (end is linear or len(sizes) in (2, 3)):
        steps.append(end(sizes))

    def function(x: Any) -> Any:
        x = x * 1.5
        for step in steps:
            x = step(x)
        return x

    return shape, function


@examples(60)
@given(chains(), ROUTES)
def test_chains_of_views_before_a_layer_keep_the_function(kit, chain, route):
    shape, function = chain
    try:
        kit.agree(function, shape, route)
    except UnsupportedModelError as error:  # the exporter's sequences, branches, wrong lengths
        odd = ("onnx.If", "onnx.SplitToSequence", "onnx.Split: cannot split")
        assume(route[1] is None or not any(text in str(error) for text in odd))
        raise
