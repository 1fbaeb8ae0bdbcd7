import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfq_jax.allocation import costs
from dfq_jax.allocation.costs import Budget, LayerWork, cost, cost_of, parse_budget
from dfq_jax.errors import BudgetError
from dfq_jax.io.onnx.export import quantized_onnx
from dfq_jax.numerics.affine import Affine
from dfq_jax.passes.fold import fold_batch_norm
from dfq_jax.quantization.plan import STORES, LayerPreset, Rule, parse_scheme, resolve, stored_as
from dfq_jax.quantization.simulate import QuantizedModel
from dfq_jax.quantization.sites import Site

READ = {
    "4.5bits": (4.5, "bits"),
    " 4 BIT ": (4, "bits"),
    "600KB": (600_000, "bytes"),
    "1.5 MB": (1_500_000, "bytes"),
    "2KiB": (2048, "bytes"),
    "77B": (77, "bytes"),
    ".5gb": (5e8, "bytes"),
    "2GBOPs": (2e9, "bops"),
    "1.25tbops": (1.25e12, "bops"),
    "900bops": (900, "bops"),
}


@pytest.mark.parametrize("text", READ)
def test_budgets_are_read(text):
    amount, unit = READ[text]
    assert parse_budget(text) == Budget(float(amount), unit)


@pytest.mark.parametrize(
    "text", ["", "4", "bits", "-4bits", "nan bits", "0KB", "4.5.1bits", "4e1bits", "1MBits", "5%"]
)
def test_nonsense_is_refused_with_examples(text):
    with pytest.raises(BudgetError, match=r"write 4\.5bits, 600KB, 1\.5MB or 2GBOPs"):
        parse_budget(text)


def test_more_bits_than_floats_have_are_refused():
    with pytest.raises(BudgetError, match="32 bits in float"):
        parse_budget("33bits")


@given(st.floats(1, 1e13), st.sampled_from(["bits", "bytes", "bops"]))
def test_written_budgets_are_read_again_and_hardly_larger(amount, unit):
    amount = min(amount, 32.0) if unit == "bits" else float(math.ceil(amount))
    again = parse_budget(str(Budget(amount, unit)))
    assert again.unit == unit
    assert amount * (1 - 1e-9) <= again.amount <= amount * 1.0002


def plan_of(model, *rules, scheme="w4a4", layers: LayerPreset = "qdrop_8bit_ends"):
    return resolve(model.graph, parse_scheme(scheme), layers, rules)


def test_average_bits_and_operations_by_hand(nets):
    model = fold_batch_norm(nets.tiny())
    plan = plan_of(model, Rule("project", weight_bits=6), Rule("conv2", keep_float=True))
    sizes = {"conv1": 162, "depthwise": 54, "project": 36, "conv2": 432, "fc": 40}
    weights = {"conv1": 8, "depthwise": 4, "project": 6, "conv2": 32, "fc": 8}
    reads = {"conv1": 8, "depthwise": 4, "project": 4, "conv2": 32, "fc": 8}
    positions = {"conv1": 64, "depthwise": 64, "project": 64, "conv2": 4, "fc": 1}
    average = sum(sizes[n] * weights[n] for n in sizes) / sum(sizes.values())
    assert cost_of(model, plan, "bits").amount == pytest.approx(average)
    work = sum(sizes[n] * positions[n] * weights[n] * reads[n] for n in sizes)
    assert cost_of(model, plan, "bops").amount == work


def test_operations_of_products_of_two_tensors(nets):
    model = fold_batch_norm(nets.vit())
    at = lambda bits: (
        cost_of(model, plan_of(model, Rule("attention0.scores", input_bits=bits)), "bops").amount
    )
    qkv = 2 * 5 * 5 * 4  # heads, tokens, tokens, width; also read by `values` at 4 bits
    assert at(8) - at(4) == qkv * (64 - 16) + qkv * 4 * (8 - 4)


def on_any_grid(model, plan):
    """The network with scales of the right shapes."""
    qparams = {}
    for site, spec in plan.entries:
        kernel = model.params[site.node]["kernel"] if site.argument is None else jnp.zeros(())
        shape = jnp.max(kernel, spec.grid.reduced_axes(kernel.ndim), keepdims=True).shape
        qparams[site] = Affine(jnp.ones(shape), jnp.zeros(shape, spec.grid.dtype))
    return QuantizedModel(model, plan, qparams)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize(
    ("net", "scheme", "layers", "rules"),
    [
        ("tiny", "w4a4", "qdrop_8bit_ends", ()),
        ("tiny", "w2a8", "zsq_all_low", (Rule("fc", weight_bits=5),)),
        ("tiny", "w3a8", "qdrop_8bit_ends", (Rule("conv2", keep_float=True),)),
        ("tiny", "w6a8", "qdrop_8bit_ends", (Rule("project", weight_bits=3),)),
        ("unet", "w4a8", "qdrop_8bit_ends", (Rule("mix1", weight_bits=7),)),
        ("vit", "w4a8", "qdrop_8bit_ends", (Rule("wide*", weight_bits=8),)),
    ],
)
def test_bytes_are_those_of_the_onnx_file(net, scheme, layers, rules, store, nets, monkeypatch):
    monkeypatch.setattr(costs, "UNPACKING", 32)  # of kernels as small as these
    model = fold_batch_norm(getattr(nets, net)())
    plan = stored_as(plan_of(model, *rules, scheme=scheme, layers=layers), store)
    file = quantized_onnx(on_any_grid(model, plan))
    weighted = [n.name for n in model.graph.nodes if "kernel" in model.params.get(n.name, {})]
    stems = tuple(f"{name}.{slot}" for name in weighted for slot in ("kernel", "bias"))
    stored = [i for i in file.graph.initializer if i.name.startswith(stems)]
    assert len(stored) >= len(weighted)
    assert cost_of(model, plan, "bytes").amount == sum(len(i.raw_data) for i in stored)


def test_of_onnx_integers_two_bits_save_no_bytes_over_four(nets):
    model = fold_batch_norm(nets.tiny())
    plans = [stored_as(plan_of(model, scheme=f"w{b}a8"), "int4") for b in range(2, 9)]
    bytes_at = [cost_of(model, plan, "bytes").amount for plan in plans]
    assert bytes_at[0] == bytes_at[1] == bytes_at[2] < bytes_at[3]
    assert len(set(bytes_at[3:])) == 1
    assert np.isclose(bytes_at[3] - bytes_at[0], (54 + 36 + 432) / 2 + (6 + 6 + 8) / 2)


def test_packed_kernels_take_as_many_bits_as_they_have(nets):
    fc = nets.tiny().graph["fc"].name
    work = LayerWork((Site(fc), Site(fc, 0)), 0, elements=80_000, scales=100)
    found = {b: cost(work, b, 8, "bytes") for b in range(2, 9)}
    assert {b: n - 600 for b, n in found.items() if b < 8} == {b: 10_000 * b for b in range(2, 8)}
    assert found[8] == 80_500
    assert cost(work, 3, 8, "bytes", "int8") == found[8]
    small = work._replace(elements=1000)
    assert cost(small, 2, 8, "bytes") == cost(small, 8, 8, "bytes")  # nodes would take more
