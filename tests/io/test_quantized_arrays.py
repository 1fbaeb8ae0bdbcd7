import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.errors import DataError
from dfq_jax.io.artifacts.quantized_arrays import load_arrays, save_arrays
from dfq_jax.numerics.affine import Grid
from dfq_jax.numerics.basis import LearnedLevels, fit_basis
from dfq_jax.numerics.levels import quantized
from dfq_jax.numerics.ranges import MinMax, weight_affine
from dfq_jax.numerics.signs import Signs, best_alpha

KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), jnp.float32)


def some():
    grid, learned = Grid(4, axis=-1, group=4), LearnedLevels(2, "signs", axis=-1)
    basis = fit_basis(learned.rows(KERNEL), 2, "signs").basis
    return {
        "grouped": quantized(KERNEL, grid, weight_affine(KERNEL, grid, MinMax())),
        "signs": quantized(KERNEL, Signs(), best_alpha(KERNEL, Signs())),
        "learned": quantized(KERNEL, learned, basis),
    }


def test_arrays_of_every_kind_come_back(tmp_path):
    wanted = some()
    save_arrays(tmp_path / "a.safetensors", wanted)
    found = load_arrays(tmp_path / "a.safetensors")
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_is_no_such_file_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(DataError, match=r"a\.safetensors holds no quantized arrays"):
        load_arrays(path)
    save_arrays(path, some())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="holds no quantized arrays"):
        load_arrays(path)


def test_names_with_a_colon_are_refused(tmp_path):
    with pytest.raises(DataError, match="'a:b' cannot be saved: its name has a colon"):
        save_arrays(tmp_path / "a", {"a:b": some()["signs"]})
