"""The float network of an output folder is found again, or refused; and the whole diagnosis."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.allocation.candidates import Judged
from dfq_jax.errors import DataError
from dfq_jax.graph.graph import Graph, Node
from dfq_jax.io.frontends.graph_files import load_graph
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.optim.progress import Watcher
from dfq_jax.quantization.plan import parse_scheme
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.diagnose import diagnose, loses_much, reference_of
from dfq_jax.report.analyze import Report


@pytest.fixture(scope="module")
def model(nets):
    return nets.tiny()


@pytest.fixture(scope="module")
def images(model, nets):
    return nets.images(model, 6)


@pytest.fixture(scope="module")
def made(model, images):
    return dfq(model, images, parse_scheme("w3a3"))


def renamed(model):
    """The same network with other names."""
    new = lambda name: name if name in model.graph.inputs else f"other.{name}"
    nodes = [Node(new(n.name), n.op, tuple(map(new, n.inputs))) for n in model.graph.nodes]
    graph = Graph(tuple(nodes), model.graph.inputs, tuple(map(new, model.graph.outputs)))
    params = {new(name): slots for name, slots in model.params.items()}
    return dataclasses.replace(model, graph=graph, params=params)


def same(found, wanted):
    assert found.graph == wanted.graph
    for name, slots in wanted.params.items():
        for slot, value in slots.items():
            np.testing.assert_allclose(found.params[name][slot], value, rtol=1e-5, atol=1e-6)
    assert set(found.moments) == set(wanted.moments)


def test_the_reference_is_that_of_the_quantization(model, made, images):
    same(reference_of(model, made.quantized, images), made.reference)


def test_the_reference_is_found_under_other_names(model, made, images):
    found = reference_of(renamed(model), made.quantized, images)
    assert found.graph == made.reference.graph
    kernel = found.params["conv2"]["kernel"]
    np.testing.assert_allclose(kernel, made.reference.params["conv2"]["kernel"], rtol=1e-5)


def test_the_reference_is_found_in_the_float_file(model, made, images, tmp_path):
    path = tmp_path / "float.onnx"
    path.write_bytes(serialize(float_onnx(model)))
    read = load_graph(path, no_bn_fallback=True).model
    found = reference_of(dataclasses.replace(read, inputs=model.inputs), made.quantized, images)
    for name, slots in made.reference.params.items():
        if "kernel" in slots:
            np.testing.assert_allclose(
                found.params[name]["kernel"], slots["kernel"], rtol=1e-4, atol=1e-6
            )


def changed(model, name, **slots):
    params = {**model.params, name: {**model.params[name], **slots}}
    return dataclasses.replace(model, params=params)


def test_another_network_is_refused(model, made, images, nets):
    kernel = model.params["conv2"]["kernel"]
    with pytest.raises(DataError, match="not the one it was made from: their kernels of 'conv2'"):
        reference_of(changed(model, "conv2", kernel=-kernel), made.quantized, images)
    with pytest.raises(DataError, match="not the one it was made from: their layers differ"):
        reference_of(nets.stem(), made.quantized, images)
    turned = changed(renamed(model), "other.conv2", kernel=jnp.zeros_like(kernel))
    with pytest.raises(DataError, match="not the one it was made from"):
        reference_of(turned, made.quantized, images)


def test_the_whole_diagnosis(made, images):
    stages: list[str] = []
    judged = lambda exact, rough: Judged(-float(np.abs(exact[0] - rough[0]).max()), 0.5)
    found = diagnose(
        made.reference,
        made.quantized,
        images,
        {"fc": 1.5},
        judge=judged,
        watch=Watcher(stages.append),
    )
    assert stages == [
        "finding ranges of 8 bits",
        "quantizing one layer at a time",
        "trying remedies",
    ]
    assert found.images == 6
    assert {c.name: c.so_far_db for c in found.costs}["fc"] == 1.5
    assert found.now.agreement == 0.5  # whoever judges decides what is said
    best = max(found.outcomes, key=lambda x: x.judged.sqnr_db)
    assert best.remedy.name == "everything at 8 bits"


@pytest.mark.parametrize(
    ("agreement", "sqnr", "much"), [(1.0, 30.0, False), (1.0, 9.0, True), (0.8, 30.0, True)]
)
def test_what_counts_as_much(agreement, sqnr, much):
    assert loses_much(Report((), agreement, 4, sqnr, True)) == much
    assert loses_much(Report((), agreement, 4, sqnr, False))
