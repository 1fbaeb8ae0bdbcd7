"""A language model through `train` and `compress`, from the rows that it writes itself."""

import jax
import numpy as np
import pytest
from llamas import llama_file

import dfq_jax as dfq
from dfq_jax.api import compress as compressing
from dfq_jax.api.request import Follow, resolved
from dfq_jax.api.shrinking import Shrinking
from dfq_jax.errors import UsageError
from dfq_jax.examples import Examples
from dfq_jax.graph.tasks import LanguageModel
from dfq_jax.io.load import load
from dfq_jax.pruning.budget import Ceiling, ladders_of
from dfq_jax.pruning.choose import ALL_BUT_ONE
from dfq_jax.pruning.criteria import CRITERIA
from dfq_jax.pruning.damage import channel_losses
from dfq_jax.pruning.groups import Subject, removables
from dfq_jax.pruning.prune import Pruning

SIZES = (8, 12, 1, 2, 1, 16, 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama of one block."""
    return load(llama_file(tmp_path_factory.mktemp("small") / "net.bin", SIZES), size=8).model


def test_channels_of_its_blocks_go(model):
    """Of the gated layers and of values; heads, whose queries turn by rotary angles, stay."""
    found = dfq.compress(model, prune="30%", scheme="w8a8", n=16, train=2)
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
    assert found.settings["trained"].startswith("2 steps of 8 rows")
    assert any("on held-out rows outputs went" in note for note in found.report.notes)
    rows = found.probes.array
    assert np.isfinite(dfq.simulate(found.quantized, rows)).all()


def test_bits_and_channels_are_decided_on_rows(model, monkeypatch):
    rows = Examples((model.input.example(jax.random.key(0), 8),), model.inputs)
    reached = []

    def joined(subject, *_):
        reached.append(subject)
        raise KeyboardInterrupt

    monkeypatch.setattr(compressing, "joined", joined)
    how = Shrinking(Pruning(0.5, "energy"), joint=Ceiling(0.5, "bytes", True))
    with pytest.raises(KeyboardInterrupt):
        compressing.decided(Subject(model), rows, how, resolved(model, {}), Follow())
    (subject,) = reached
    assert 0 < len(subject.seen) < 8
    ladders = ladders_of(
        removables(subject).groups, CRITERIA["energy"].score(subject), ALL_BUT_ONE, 2
    )
    losses = channel_losses(subject, ladders)
    assert (losses[:, 0] > 0).all()
    assert (losses[:, 1] == 0).all()


def test_it_learns_from_what_it_writes(model):
    found = dfq.train(model, method="zsaq", scheme="w4a8", steps=10, batch=4, n=16)
    assert found.settings["training"] == "zsaq"
    assert found.settings["gap after"] <= found.settings["gap before"]
    assert any("on held-out rows outputs went" in note for note in found.report.notes)
    with pytest.raises(UsageError, match="gdfq shows images, and this network reads"):
        dfq.train(model, method="gdfq")
    with pytest.raises(UsageError, match="takes 16 rows a step and there are"):
        dfq.train(model, method="zsaq", n=16)
