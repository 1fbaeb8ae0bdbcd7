"""`configs/`: a file called published is the published setting, by a table of what cards say.

Each row is written down from the paper's card, not from the code; what a file resolves to is held
against it. What the tool would add on its own (a quarter held out, images kept to possible pixels,
wider grids of 8 bits, equalization, corrected biases) is off unless the card has it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from dfq_jax.api.quantize import making_for
from dfq_jax.api.request import Settings, configured, resolved
from dfq_jax.cli.config import read_tables
from dfq_jax.graph.ops import GlobalAvgPool
from dfq_jax.graph.query import batch_norms
from dfq_jax.numerics.ranges import ImageMinMax, Lp, LpShift, MinMax, Observer, Statistics
from dfq_jax.passes.before_quantization import Surgery
from dfq_jax.quantization.observers import Observers
from dfq_jax.recipes.presets import recipe_for
from dfq_jax.recipes.trainings import training_for
from dfq_jax.reconstruction.method import Reconstruction, fisher_gap
from dfq_jax.training.method import Training
from dfq_jax.types import InputContract

FOLDER = Path(__file__).parents[1] / "configs"
OURS = {"best_cifar", "best_imagenet"}
IMAGES_ALONE = {
    "deepinversion_images": ("deepinversion", 84, 3000),
    "mct_images": ("mct", 1024, 1000),
}
NOT_EQUALIZED = Surgery(reach=None)


class Row(NamedTuple):
    """What a paper's card says.

    Attributes:
      scheme: bits.
      layers: which stay at 8 bits.
      weights: observer of kernels.
      activations: of all else.
      made: (method, images, steps) where the paper makes images; images `None`: one a batch norm.
      surgery: of the float network.
      bias: correction.
      reestimate: norms.
      learned: what its rounding is, in the card's numbers.
      raw: nothing is held out or clipped.
      budget: of bits.
    """

    scheme: str
    layers: str
    weights: Observer
    activations: Observer
    made: tuple[str, int | None, int] | None = None
    surgery: Surgery = NOT_EQUALIZED
    bias: str = "none"
    reestimate: bool = False
    learned: Mapping[str, Any] = {}
    raw: bool = True
    budget: str | None = None


BLOCKS = {"batch": 32, "bits_rate": 1e-3, "edges_rate": 4e-5, "layers": False}
QDROP = {**BLOCKS, "steps": (20_000,), "penalty": 0.01, "drop": 0.5, "input_once": True}
CARDS: Mapping[str, Row] = {
    "zeroq_w8a8": Row("w8a8", "zsq_all_low", MinMax(), MinMax(), ("zeroq", 32, 500)),
    "zeroq_mixed": Row(
        "w4a8", "zsq_all_low", MinMax(), MinMax(), ("zeroq", 32, 500), budget="4bits"
    ),
    "dsg_w4a4": Row("w4a4", "zsq_all_low", MinMax(), ImageMinMax(), ("dsg", None, 500)),
    "dsg_journal_w4a4": Row(
        "w4a4", "zsq_all_low", MinMax(), ImageMinMax(), ("dsg_journal", 40, 500)
    ),
    "aac_w4a4": Row(
        *("w4a4", "zsq_all_low", MinMax(), MinMax(), ("aac", 64, 500)), reestimate=True
    ),
    "psaq_vit_w8a8": Row("w8a8", "qdrop_8bit_ends", MinMax(), MinMax(), ("psaq_vit", 32, 1000)),
    "sardfq_w4a4": Row("w4a4", "qdrop_8bit_ends", MinMax(), MinMax(), ("sardfq", 32, 1000)),
    "dfq_w8a8": Row(
        *("w8ta8", "qdrop_8bit_ends", MinMax(), Statistics()),
        surgery=Surgery("pairs", "replace", absorb=True),
        bias="analytic",
        raw=False,
    ),
    "genie": Row(
        *("w4a4", "brecq_8bit_ends_second", Lp(2.4), Lp(2.4), ("genie", 1024, 4000)),
        learned={**QDROP, "penalty": 1.0, "input_once": False, "scale_rate": 1e-4},
    ),
    "adaround_w4a8": Row(
        *("w4a8", "qdrop_8bit_ends", Lp(2.4), Lp(2.4)),
        learned={
            **{"batch": 32, "steps": (10_000,), "penalty": 0.01, "layers": True},
            **{"curve": "cosine", "drop": 0.0, "weights_alone": (True,), "bits_rate": 1e-3},
        },
    ),
    "brecq": Row(
        *("w2a4", "brecq_8bit_ends_second", Lp(2.4), Lp(2.4)),
        learned={
            **BLOCKS,
            **{"steps": (20_000, 5_000), "penalty": 0.01, "curve": "linear", "fisher": True},
            **{"edges_rate": 4e-4, "skip_first": True, "weights_alone": (True, False)},
        },
    ),
    "qdrop": Row("w2a2", "qdrop_8bit_ends", Lp(2.4), LpShift(2.4), learned=QDROP),
    "pd_quant": Row(
        *("w2a2", "qdrop_8bit_ends", Lp(2.4), Lp(2.4)),
        learned={**QDROP, "bits_rate": 3e-3, "prediction": (10.0, 4.0), "closeness": 0.02},
    ),
    "flexround_w4a8": Row(
        *("w4a8", "qdrop_8bit_ends", Lp(2.4), Lp(2.4)),
        learned={"batch": 32, "steps": (5_000,), "drop": 0.5, "input_once": True},
    ),
    "aquant_w2a2": Row("w2a2", "qdrop_8bit_ends", Lp(2.4), LpShift(2.4), learned=QDROP),
}


def test_every_file_has_a_row():
    files = {path.stem for path in FOLDER.glob("*.toml")}
    assert files == {*CARDS, *OURS, *IMAGES_ALONE, "intraq_w4a4"}


@pytest.mark.parametrize("name", CARDS)
def test_a_published_file_is_the_published_setting(name, tiny_net):
    card, (images, settings) = CARDS[name], configured(FOLDER / f"{name}.toml")
    asked = resolved(tiny_net, cast(Settings, settings))
    how, making = asked.pipeline, making_for(tiny_net, asked)
    assert images is None
    assert (str(how.scheme), how.layers) == (card.scheme, card.layers)
    assert how.observers == Observers(card.weights, card.activations)
    assert (how.surgery, how.reestimate, how.raw) == (card.surgery, card.reestimate, card.raw)
    assert (how.even, how.spare and how.observers is None, how.enlarge) == (False, False, None)
    assert how.rules == ()
    assert (how.budget and str(how.budget)) == card.budget
    if card.made is not None:
        method, n, steps = card.made
        n = len(batch_norms(tiny_net.graph)) if n is None else n
        assert (making.method, making.n, making.steps) == (method, n, steps)
    if not card.learned:
        assert (how.methods, how.bias) == ((), card.bias)
        return
    (learned,) = how.methods
    assert isinstance(learned, Reconstruction)
    found = numbers(learned)
    assert {key: found[key] for key in card.learned} == card.learned
    assert (learned.start, learned.lines, learned.guided) == (None, 0, False)
    assert not how.doubt


def numbers(method: Reconstruction) -> dict[str, Any]:
    """A reconstruction in the words of its card."""
    last = method.phases[-1]
    if method.fisher:
        assert method.loss is fisher_gap
    return {
        "batch": method.batch,
        "steps": tuple(phase.steps for phase in method.phases),
        "weights_alone": tuple(phase.weights_alone for phase in method.phases),
        "drop": last.quantized,
        "input_once": last.input_once,
        "penalty": method.penalty.weight,
        "curve": method.penalty.curve,
        "bits_rate": method.rates.bits,
        "scale_rate": method.rates.scale,
        "edges_rate": method.rates.edges,
        "layers": method.layers,
        "fisher": method.fisher,
        "skip_first": method.skip_first,
        "prediction": None if method.prediction is None else tuple(method.prediction),
        "closeness": None if method.correction is None else method.correction.closeness,
    }


@pytest.mark.parametrize("name", IMAGES_ALONE)
def test_published_files_of_images_alone(name, nets):
    table = read_tables(FOLDER / f"{name}.toml")["synthesize"]
    recipe = recipe_for(table["method"])
    assert (table["method"], table["n"], table["steps"]) == IMAGES_ALONE[name]
    assert (recipe.steps, recipe.batch) == (table["steps"], table["batch"])


SIZES = {"cifar": (32, 10), "cifar-100": (32, 100), "imagenet": (224, 1000)}
INTRAQ = {
    "cifar": ({"lower": 0.05, "upper": 0.8, "target": 0.95}, 256, 1e-4),
    "cifar-100": ({"lower": 0.02, "upper": 1.0, "target": 0.6}, 256, 1e-4),
    "imagenet": ({"lower": 0.0, "upper": 2.0, "target": 1.0}, 16, 1e-6),
}


@pytest.mark.parametrize("data", INTRAQ)
def test_intraq_of_cifar_and_of_imagenet(data, nets):
    """Images and student with the values of the released script for such a network."""
    tables = read_tables(FOLDER / "intraq_w4a4.toml")
    size, classes = SIZES[data]
    b = nets.Builder(InputContract(size, size))
    pooled = b.op("pool", GlobalAvgPool(), b.unit("conv", "images", 4, stride=4))
    network = b.done(b.linear("fc", pooled, classes))
    settings, batch, rate = INTRAQ[data]
    recipe = recipe_for(tables["synthesize"]["method"], model=network)
    assert {key: recipe.settings[key] for key in settings} == settings
    assert (recipe.steps, recipe.batch, recipe.settings["smallest"]) == (1000, 256, 0.5)
    assert tables["train"] == {"method": "intraq_qat", "scheme": "w4a4", "layers": "zsq_all_low"}
    found = training_for("intraq_qat", model=network)
    assert isinstance(found, Training)
    assert (found.recipe, found.batch) == ("intraq", batch)
    assert found == training_for("intraq_qat", model=network)
    weights = {term.name: term.weight for term in found.terms}
    assert weights == {"CE": 1.0, "KL": 20.0}
    assert repr(rate) in repr(found.optimizer)
