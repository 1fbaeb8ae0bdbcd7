"""Settings of `dfq.quantize` from files and dictionaries."""

import dataclasses
from typing import get_type_hints

import pytest

import dfq_jax as dfq
from dfq_jax.api.request import KINDS, NAMES, Settings, configured, resolved
from dfq_jax.cli.options import QuantizeOptions
from dfq_jax.errors import UsageError
from dfq_jax.quantization.plan import Rule
from dfq_jax.recipes.pipeline import Names, Pipeline, pipeline_for

VERSION = "schema_version = 1\n"
FILE = """
[model]
name = "net.pth"
sha256 = "ab"
[quantize]
scheme = "w4a8"
reconstruction-steps = 7
reconstruction = "qdrop"
seed = 3
memory = "1GiB"
arch = "resnet18"
accuracy = 0.5
[[rules]]
pattern = "conv1"
bits = 8
"""
SAYS = {
    **{"scheme": "w4a8", "reconstruction_steps": 7, "reconstruction": "qdrop", "seed": 3},
    **{"memory": 1 << 30, "accuracy": 0.5, "rules": (Rule("conv1", 8, 8),)},
}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(VERSION + FILE)
    return file


def test_a_file_says_what_quantize_is_told(path):
    assert configured(path) == configured(str(path)) == (None, SAYS)


def test_so_does_a_dictionary():
    table = {"scheme": "w4a8", "rules": ["a=8", {"pattern": "b", "bits": 4}], "images": "i.npz"}
    images, settings = configured(table)
    assert str(images) == "i.npz"
    assert settings == {"scheme": "w4a8", "rules": (Rule("a", 8, 8), Rule("b", 4, 4))}
    assert configured({"quantize": table, "schema_version": 1}) == (images, settings)
    assert configured({"steps": 5, "reconstruction_steps": 4}).settings == {
        **{"steps": 5, "reconstruction_steps": 4}
    }
    assert configured({}) == (None, {})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"schem": "w4a4"}, "setting of config 'schem' is none of scheme.*nearest: scheme"),
        ({"seed": "many"}, "seed = 'many' is no value of that setting"),
        ({"seed": True}, "seed = True is no value of that setting"),
        ({"scheme": 4}, "scheme = 4 is no value of that setting"),
        ({"rule": "fc"}, "rule 'fc' is none: write PATTERN=8"),
        ({"memory": "lots"}, "'lots' is no amount of memory"),
        ({"quantise": {}, "quantize": {}}, "'quantise' is none of synthesize, quantize"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(table, message):
    with pytest.raises(UsageError, match=f"(?s){message}"):
        configured(table)


def test_what_is_given_wins(tiny_net, nets, path):
    images = dfq.Examples((nets.images(tiny_net, 8),), tiny_net.inputs)
    config = {"scheme": "w4a8", "preset": "balanced", "seed": 5}
    found = dfq.quantize(tiny_net, images, config=config, preset="fast").settings
    assert (found["scheme"], found["preset"], found["seed"]) == ("w4a8", "fast", 5)
    with pytest.raises(UsageError, match="no image set at"):
        dfq.quantize(tiny_net, config={"images": str(path.with_name("none.npz"))})


def test_one_list_of_settings(tiny_net):
    """The command line, files and the Python API have the same, and one place for what is left."""
    hints = get_type_hints(pipeline_for)
    assert {k: hints[k] for k in hints if k not in ("model", "return")} == get_type_hints(Names)
    assert get_type_hints(Names).keys() < get_type_hints(Settings).keys() == set(NAMES)
    assert set(KINDS) == set(NAMES) - {"probes"} | {"images"}
    flags = {f.name for f in dataclasses.fields(QuantizeOptions)}
    assert {"seed", "rule", *NAMES} - {"rules", "probes"} <= flags
    assert resolved(tiny_net, {}).pipeline == pipeline_for(tiny_net) != Pipeline()
