"""A language model through `train` and `compress`, from the rows that it writes itself."""

import numpy as np
import pytest
from llamas import llama_file

import dfq_jax as dfq
from dfq_jax.errors import UsageError
from dfq_jax.graph.tasks import LanguageModel
from dfq_jax.io.load import load

SIZES = (8, 12, 1, 2, 1, 16, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of one block."""
    return load(llama_file(tmp_path_factory.mktemp("small") / "net.bin", SIZES), size=8).model


def test_channels_of_its_blocks_go(model):
    """Of the gated layers and of values; heads, whose queries turn by rotary angles, stay."""
    found = dfq.compress(model, prune="30%", scheme="w8a8", n=16)
    small = found.float_model.params
    width = {name: small[name]["kernel"].shape for name in small if "kernel" in small[name]}
    block = "layers.0.feed_forward"
    assert width[f"{block}.w1"] == width[f"{block}.w3"] == width[f"{block}.w2"][::-1]
    assert width[f"{block}.w1"][1] < 12
    assert width["layers.0.attention.wv"][1] < 4
    assert width["layers.0.attention.wq"] == (8, 8)
    assert found.report.task == LanguageModel()
    assert found.report.rows
    assert "held-out rows of text" in found.summary()
    rows = found.probes.array
    assert np.isfinite(dfq.simulate(found.quantized, rows)).all()


def test_it_learns_from_what_it_writes(model):
    found = dfq.train(model, method="zsaq", scheme="w4a8", steps=10, batch=4, n=16)
    assert found.settings["training"] == "zsaq"
    assert found.settings["gap after"] <= found.settings["gap before"]
    assert any("on held-out rows outputs went" in note for note in found.report.notes)
    with pytest.raises(UsageError, match="gdfq shows images, and this network reads"):
        dfq.train(model, method="gdfq")
    with pytest.raises(UsageError, match="takes 16 rows a step and there are"):
        dfq.train(model, method="zsaq", n=16)
