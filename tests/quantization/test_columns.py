"""Kernels fitted side by side have the grids that each has alone, bit by bit."""

from typing import Any

import jax
import numpy as np
import pytest

from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.ranges import Entropy, Lp, MinMax, Omse
from dfq_jax.quantization import columns
from dfq_jax.quantization.calibrate import fit_kernel
from dfq_jax.quantization.columns import fit_side_by_side, in_columns
from dfq_jax.quantization.plan import Site, Spec

SHAPES = ((3, 3, 3, 8), (3, 3, 1, 24), (1, 1, 24, 5), (40, 7), (5, 5, 1, 1), (16, 3))


@pytest.fixture(scope="module")
def kernels():
    rng = np.random.default_rng(0)
    made = [rng.normal(size=s) * np.exp(rng.normal(size=s[-1])) for s in SHAPES]
    made[0][..., 2] = 0.0  # a dead channel
    made[3][:, 1] = abs(made[3][:, 1]) + 0.1  # one that never reaches zero
    return {Site(f"layer{i}"): k.astype(np.float32) for i, k in enumerate(made)}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("observer", [MinMax(), Lp(2.4), Omse()], ids=str)
def test_grids_are_those_of_each_kernel_alone(observer, symmetric, kernels):
    spec = Spec(Grid(4, symmetric, axis=-1), observer)
    found = fit_side_by_side({site: (jax.device_put(k), spec) for site, k in kernels.items()})
    assert list(found) == list(kernels)
    for site, kernel in kernels.items():
        alone = fit_kernel(kernel, spec)
        for ours, theirs in zip(found[site], alone, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_one_program_serves_kernels_of_a_length(kernels):
    spec = Spec(Grid(5, True, axis=-1), Lp(2.0))
    program: Any = columns.fit_columns
    before = program._cache_size()
    fit_side_by_side({site: (k, spec) for site, k in kernels.items()})
    assert program._cache_size() == before + 2  # of 32 and 128 rows


@pytest.mark.parametrize(
    ("rows", "length"), [(1, 32), (32, 32), (33, 128), (513, 2048), (2049, 4096), (4097, 8192)]
)
def test_lengths_of_columns_are_few(rows, length):
    assert columns.length_for(rows) == length


def test_what_must_be_fitted_alone():
    kernel = np.zeros((3, 3, 4, 4), np.float32)
    whole, groups = Grid(8, True), Grid(8, True, axis=-1, group=2)
    assert in_columns(kernel, Spec(Grid(8, True, axis=-1), Lp()))
    assert not in_columns(kernel, Spec(whole, Lp()))
    assert not in_columns(kernel, Spec(groups, Lp()))
    assert not in_columns(kernel, Spec(Grid(8, True, axis=-1), Entropy()))
