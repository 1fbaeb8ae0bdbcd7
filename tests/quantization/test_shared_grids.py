"""What a grid that several tensors share costs the small ones, against NumPy."""

import sys

import jax
import numpy as np
import pytest

from dfq_jax.graph.ops import Add, Concat, Relu, Reshape, Scale
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.calibrate import calibrate
from dfq_jax.quantization.plan import Scheme, resolve
from dfq_jax.quantization.shared_grids import parts_of, shared_grids
from dfq_jax.quantization.sites import Site
from dfq_jax.types import InputContract


def quantized(model, scheme="w8a8", n=8):
    model = fold_batch_norm(model)
    images = jax.random.normal(jax.random.key(1), (n, *model.contract.shape))
    scheme = Scheme(int(scheme[1]), int(scheme[3]))
    return calibrate(model, resolve(model.graph, scheme), images), images


def unequal(nets, factor, *, absorbed=False):
    """A branch `factor` times as large as the other two, joined in two steps and read."""
    b = nets.Builder(InputContract(6, 6))
    large = b.op("large", Scale(factor), b.unit("one", "images", 4))
    small = b.conv("small", "images", 3, bias=True)
    other = b.conv("other", "images", 2, bias=True)
    x = b.op("join", Concat(3), b.op("inner", Concat(3), large, small), other)
    x = b.op("rectified", Relu(), x) if absorbed else x
    return b.done(b.conv("last", x, 3, kernel=1, bias=True))


def on_grid(x, affine, bits=8):
    scale, zero = float(affine.scale), int(affine.zero_point)
    return (np.clip(np.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def decibels(x, rough):
    return 10 * np.log10((x**2).mean() / ((x - rough) ** 2).mean())


@pytest.mark.parametrize("absorbed", [False, True])
def test_the_loss_of_each_part_against_numpy(nets, absorbed):
    made, images = quantized(unequal(nets, 300.0, absorbed=absorbed))
    found = {(x.tensor, x.part): x for x in shared_grids(made, images)}
    tensor = "rectified" if absorbed else "join"
    parts = {part for at, part in found if at == tensor}
    assert parts == {"small", "other"}
    values = nets.forward(made.model, images)
    affine = made.qparams[Site("last", 0)]
    for name in parts:
        x = np.maximum(values[name], 0) if absorbed else values[name]
        assert found[tensor, name].shared_db == pytest.approx(
            decibels(x, on_grid(x, affine)), abs=1e-2
        )
        low, high = min(x.min(), 0), x.max()  # the search does at least as well as the extremes
        scale = (high - low) / 255
        widest = np.clip(np.round(x / scale) + round(-low / scale), 0, 255) - round(-low / scale)
        assert found[tensor, name].own_db >= decibels(x, widest * scale) - 0.3
        assert found[tensor, name].own_db < 60
        lost = found[tensor, name].db_lost
        assert lost == found[tensor, name].own_db - found[tensor, name].shared_db > 20


def test_the_worst_comes_first_and_equal_parts_are_not_told(nets):
    made, images = quantized(unequal(nets, 300.0))
    losses = [x.db_lost for x in shared_grids(made, images)]
    assert losses == sorted(losses, reverse=True)
    made, images = quantized(unequal(nets, 2.0))
    assert shared_grids(made, images) == ()
    assert shared_grids(made, images, least=-100.0) != ()


def test_nothing_is_computed_where_no_grid_is_shared(nets, monkeypatch):
    made, images = quantized(nets.tiny())
    monkeypatch.setattr(sys.modules[shared_grids.__module__], "energies_of", None)
    assert shared_grids(made, images) == ()


def test_pieces_of_a_tensor_share_its_grid(nets):
    b = nets.Builder(InputContract(6, 6))
    x = b.conv("wide", "images", 6, bias=True)
    b.params["wide"]["kernel"][..., 3:] *= 1e-3
    b.params["wide"]["bias"][3:] *= 1e-3
    moved = b.op("moved", Reshape((36, 6)), x)
    large, small = b.part("first", moved, 0, 3), b.part("second", moved, 3, None)
    made, images = quantized(b.done(b.linear("a", large, 2), b.linear("b", small, 2)))
    (found,) = shared_grids(made, images)
    assert (found.tensor, found.part) == ("wide", "second")
    assert found.shared_db < 3
    assert set(found.to_dict()) == {"tensor", "part", "own_db", "shared_db", "db_lost"}


def test_inputs_of_a_sum_have_grids_of_their_own(nets):
    b = nets.Builder(InputContract(6, 6))
    large = b.op("large", Scale(1000.0), b.conv("one", "images", 4))
    x = b.op("sum", Add(), large, b.conv("two", "images", 4))
    made, images = quantized(b.done(b.conv("last", x, 3)))
    first, second = (made.affines[Site("sum", i)] for i in range(2))
    assert first.scale > 100 * second.scale
    assert parts_of(made.model, made.plan.groups) == ()
    assert shared_grids(made, images) == ()


def test_what_leaves_the_network_shares_nothing(nets):
    b = nets.Builder(InputContract(6, 6))
    large = b.op("large", Scale(1000.0), b.conv("one", "images", 4))
    made, images = quantized(b.done(b.op("join", Concat(3), large, b.conv("two", "images", 4))))
    assert shared_grids(made, images) == ()
