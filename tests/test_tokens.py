"""Networks of tokens from file to file: read, sampled, quantized, verified, kept, read again."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from llamas import bert_folder, llama_file

import dfq_jax as dfq
from dfq_jax.api.result import Result
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.graph import Model
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.load import load
from dfq_jax.quantization.plan import Site
from dfq_jax.types import InputContract


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Model:
    return load(llama_file(tmp_path_factory.mktemp("net") / "net.bin"), size=8).model


@pytest.fixture(scope="module")
def made(llama) -> Result:
    return dfq.quantize(llama, n=8)


def test_a_language_model_is_judged_by_its_own_text(made):
    (output,) = made.report.outputs
    assert (output.measure, output.classes) == ("divergence_nats", 32)
    assert 0 < output.fidelity < 0.1
    assert made.report.coverage == 1.0
    assert "of the tokens of 2 held-out rows of text" in made.summary()
    assert (len(made.images), len(made.probes), made.images.evidence) == (8, 2, "statistics")


def test_what_norms_and_softmax_read_stays_in_float(made):
    graph, table = made.quantized.model.graph, made.quantized.plan.table
    kinds = {n.name: type(n.op).__name__ for n in graph.nodes}
    read = {kinds[site.node] for site in table if site.argument is not None}
    assert not read & {"RmsNorm", "Rotary", "Softmax", "Select", "Compare", "Embed"}
    assert Site("layers.0.attention.add", 0) not in table  # the residual stream
    assert {"MatMul", "Linear", "Mul"} <= read


def test_its_file_computes_what_was_simulated_and_is_read_again(made, tmp_path):
    found = made.verify()
    assert found.passed, found.failures
    assert found.most_steps <= 1
    made.save(tmp_path / "out", verification=found)
    again = load_artifact(tmp_path / "out")
    assert again.quantized.model.inputs == made.quantized.model.inputs
    assert dfq.verify(tmp_path / "out").passed
    assert "8 tokens of 32" in (tmp_path / "out/report.html").read_text()


@pytest.mark.slow
def test_groups_are_solved_in_closed_form(llama):
    rows = dfq.synthesize(llama, n=16, seed=3)
    make = partial(dfq.quantize, llama, rows, scheme="w3g8", layers="zsq_all_low")
    nearest, solved = (
        make(reconstruction=name).report.outputs[0].fidelity or 0.0
        for name in ("nearest", "closed_form")
    )
    assert 0 < solved < nearest


def test_an_encoder_is_judged_by_its_directions(tmp_path):
    model = load(bert_folder(tmp_path / "net"), size=6).model
    found = dfq.quantize(model, n=8, task="embedding")
    (output,) = found.report.outputs
    assert output.measure == "cosine"
    assert (output.fidelity or 0.0) > 0.99
    assert found.report.confidence == "low"  # nothing is known of what it reads
    checked = found.verify()
    assert checked.passed, checked.failures
    assert checked.most_steps <= 1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (np.full((4, 8), 32), "row 0 has 32 at .0,.; ids are 0 to 31"),
        (np.full((4, 8), -1), "ids are 0 to 31"),
        (np.zeros((4, 9), int), "the network reads .8,."),
        (np.zeros((4, 8)), "the examples are float"),
        ("nowhere.npy", "holds no rows"),
    ],
)
def test_rows_that_are_none_are_refused(llama, rows, told):
    with pytest.raises(UsageError, match=told):
        dfq.quantize(llama, rows)


def test_rows_are_given_as_arrays_and_files(llama, tmp_path):
    ids = np.random.default_rng(0).integers(0, 32, (4, 8))
    np.save(tmp_path / "rows.npy", ids)
    np.savez(tmp_path / "rows.npz", rows=ids)
    for given in (ids, tmp_path / "rows.npy", tmp_path / "rows.npz"):
        found = dfq.quantize(llama, given)
        assert found.images.given
        assert found.images.provenance["method"] == "given"
        np.testing.assert_array_equal(found.images.array, ids)


def test_examples_of_images_are_refused(llama):
    images = Examples((jnp.zeros((4, 2, 2, 3)),), (InputContract(2, 2),))
    with pytest.raises(UsageError, match=r"the network reads .8,."):
        dfq.quantize(llama, images)
    with pytest.raises(UsageError, match="zeroq"):
        dfq.quantize(llama, method="zeroq")
