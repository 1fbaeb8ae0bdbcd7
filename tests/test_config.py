"""Options from TOML files: what they fill in, what is refused, runs they repeat, and `configs/`."""

import hashlib
import tomllib
from pathlib import Path

import numpy as np
import pytest
from plain_text import plain

from dfq_jax.cli import config
from dfq_jax.cli.app import app
from dfq_jax.io.artifacts.images import load_images
from dfq_jax.recipes.reconstructions import LEARNED, OURS

PUBLISHED = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
VERSION = "schema_version = 1\n"


@pytest.fixture
def written(tmp_path):
    """Writes a file; without `version`, with the one that is read."""

    def write(text, version=VERSION):
        path = tmp_path / "run.toml"
        path.write_text(version + text)
        return path

    return write


def parsed(verb, *line):
    """The options of a command, as the program would see them."""
    words = [verb, "net.pth", "-o", "out", *map(str, line)]
    bound = app.parse_args(words, print_error=False, exit_on_error=False)[1]
    return bound.kwargs["options"]


# what a file fills in


def test_what_the_command_line_leaves_out_is_filled_in(written):
    path = written(
        '[quantize]\nscheme = "w4a4"\nreconstruction = "qdrop"\nreconstruction-steps = 50\n'
        'arch = "resnet18"\nno-bn-fallback = true\nseed = 3\n[synthesize]\nn = 7\n'
    )
    found = parsed("quantize", "--config", path, "--seed", 4, "--scheme", "w2a2")
    assert (found.scheme, found.seed) == ("w2a2", 4)
    assert (found.reconstruction, found.reconstruction_steps) == ("qdrop", 50)
    assert (found.reading.arch, found.reading.no_bn_fallback) == ("resnet18", True)
    assert found.preset == "fast"
    assert parsed("synthesize", "--config", path).n == 7
    assert parsed("synthesize", "--config", path, "-n", 9).n == 9


@pytest.mark.parametrize(("text", "size"), [("224", 224), ('"48x192"', "48x192")])
def test_a_size_is_a_number_or_two(written, text, size):
    path = written(f'[quantize]\nsize = {text}\nlayout = "nhwc"\n')
    found = parsed("quantize", "--config", path).reading
    assert (found.size, found.layout) == (size, "nhwc")
    given = parsed("quantize", "--config", path, "--size", "8x16", "--layout", "nchw").reading
    assert (given.size, given.layout) == ("8x16", "nchw")
    assert parsed("synthesize", "--size", "32").reading.size == 32
    again = config.settings_toml("quantize", parsed("quantize", "--config", path)).decode()
    assert f"size = {text}" in again


def test_an_accuracy_may_have_a_decimal_point(written):
    path = written("[quantize]\naccuracy = 0.72\n")
    assert parsed("quantize", "--config", path).accuracy == 0.72
    assert parsed("quantize", "--config", path, "--accuracy", 0.9).accuracy == 0.9


def test_underscores_are_read_as_dashes(written):
    path = written("[quantize]\nreconstruction_steps = 50\n")
    assert parsed("quantize", "--config", path).reconstruction_steps == 50


def test_a_flag_that_is_repeated_is_a_list(written):
    path = written('[quantize]\nrule = ["layer1.*=8", "fc=float"]\n')
    assert parsed("quantize", "--config", path).rule == ("layer1.*=8", "fc=float")
    given = parsed("quantize", "--config", path, "--rule", "a=w4", "--rule", "b=a8")
    assert given.rule == ("a=w4", "b=a8")
    assert parsed("quantize").rule == ()


def test_one_text_is_a_list_of_one(written):
    path = written('[quantize]\nrule = "fc=8"\n')
    assert parsed("quantize", "--config", path).rule == ("fc=8",)


def test_rules_of_a_file_are_read_as_those_of_the_command_line(dfq, written, tmp_path):
    found = dfq("quantize", "no.pth", "-o", tmp_path, "--config", written('[quantize]\nrule=["f"]'))
    assert found.code == 2
    assert "rule 'f' is none: write PATTERN=8, =w8, =a8, =w4a8, =w4g64, =w8t or =float" in found.err


def test_rules_are_repeated_with_a_run():
    options = parsed("quantize", "--rule", "fc=8", "--rule", "x=float")
    table = tomllib.loads(config.settings_toml("quantize", options).decode())["quantize"]
    assert table["rule"] == ["fc=8", "x=float"]
    assert "rule" not in config.settings_toml("quantize", parsed("quantize")).decode()


# what is refused


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "[quantize]\nreconstruction-step = 5",
            ["[reconstruction-step]", "--reconstruction-steps"],
        ),
        ('[quantize]\npreset = "bst"', ["bst", "[preset]", "best"]),
        ('[quantize]\nseed = "many"', ["[seed]", "many", "int"]),
        ("[quantize]\nreconstruction-steps = true", ["[reconstruction-steps]", "int"]),
        ("[quantize]\nreconstruction-steps = 1.5", ["reconstruction-steps = 1.5", "whole number"]),
        ("[quantize]\nmean = [0.5, true]", ["mean = [0.5, True]", "text in quotes"]),
        ('[quantize]\nrule = ["fc", 3]', ["rule = ['fc', 3]", "list of texts"]),
        ('[quantize]\nmean = ["0.5", "0.5"]', ["mean"]),
        ("[quantise]\nseed = 1", ["'quantise'", "nearest: quantize"]),
        ("[quantize.more]\nseed = 1", ["more = {'seed': 1}"]),
        ("quantize = 3", ["quantize = 3 must be a table"]),
        ("[synthesize]\nn = 3", ["has no table [quantize], only [synthesize]."]),
        ("", ["has no table [quantize]."]),
        ("[quantize]\nseed = ]", ["is not TOML", "line 3"]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(dfq, written, tmp_path, text, messages):
    path = written(text)
    found = plain(dfq("quantize", "net.pth", "-o", tmp_path / "out", "--config", path))
    assert (found.code, found.out) == (2, "")
    assert "Traceback" not in found.err
    said = " ".join(found.err.replace("│", " ").split())
    assert "run.toml" in said.replace(" ", "")
    assert all(m.replace(" ", "") in said.replace(" ", "") for m in messages), said
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"]


@pytest.mark.parametrize("version", ["", "schema_version = 2\n", 'schema_version = "1"\n'])
def test_other_schema_versions_are_refused(dfq, written, version):
    found = dfq("quantize", "net.pth", "-o", "out", "--config", written("[quantize]", version))
    assert found.code == 2
    assert "write schema_version = 1 at its top" in found.err


def test_a_file_that_is_not_there(dfq, tmp_path):
    found = dfq("synthesize", "net.pth", "-o", "i.npz", "--config", tmp_path / "no.toml")
    assert found.code == 2
    assert "no.toml: No such file or directory." in found.err


# runs that are repeated


def test_what_a_run_writes_repeats_it(dfq, made, tmp_path):
    net, again = made / "net.safetensors", tmp_path / "again"
    assert dfq("quantize", net, "-o", again, "--config", made / "out" / "config.toml").code == 0
    written = ("model.onnx", "model.safetensors", "config.toml", "probe.npz")
    assert all((again / n).read_bytes() == (made / "out" / n).read_bytes() for n in written)
    images = tmp_path / "images.npz"
    assert dfq("synthesize", net, "-o", images, "--config", made / "images.npz.toml").code == 0
    same = np.array_equal(load_images(images).images, load_images(made / "images.npz").images)
    assert same
    assert (tmp_path / "images.npz.toml").read_bytes() == (made / "images.npz.toml").read_bytes()


def test_a_folder_of_images_says_how_it_was_made(dfq, made, tmp_path):
    folder = tmp_path / "set"
    line = ("synthesize", made / "net.safetensors", "--arch", "small", "-n", 4, "--batch", 2)
    assert dfq(*line, "--steps", 2, "-o", folder).code == 0
    found = config.read_tables(folder / "config.toml")["synthesize"]
    assert (found["n"], found["batch"], found["steps"], found["arch"]) == (4, 2, 2, "small")
    assert not config.PLACES & set(found)
    assert len(load_images(folder)) == 4


def test_files_of_others_of_that_name_are_left_alone(dfq, made, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.toml").write_text("mine")
    line = ("quantize", made / "net.safetensors", "--arch", "small", "-o", out, "--force")
    found = dfq(*line, "--images", made / "images.npz")
    assert found.code == 2
    assert "config.toml, not written by dfq_jax" in found.err
    assert (out / "config.toml").read_text() == "mine"


def test_a_file_names_the_model_that_it_was_used_for(dfq, made, tmp_path):
    """And where it is used for another one, that is said."""
    net = made / "net.safetensors"
    names = made / "out" / "config.toml", made / "images.npz.toml"
    digest = hashlib.sha256(net.read_bytes()).hexdigest()
    for path in names:
        told = tomllib.loads(path.read_text())["model"]
        assert told["name"] == "net.safetensors"
        assert told["architecture"] == "small"
        assert told["sha256"] == digest
    config.read_tables(names[0])
    other = tmp_path / "run.toml"
    other.write_text(names[0].read_text().replace(digest, "ab"))
    line = ("quantize", net, "--images", made / "images.npz", "-o", tmp_path / "out")
    found = dfq(*line, "--config", other)
    assert found.code == 0
    assert "run.toml was made for net.safetensors (sha256 ab), not this" in found.err
    assert "was made for" not in dfq(*line, "--config", names[0]).err


# published settings


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_settings_are_those_of_their_methods(path):
    tables = tomllib.loads(path.read_text())
    assert tables.pop("schema_version") == config.SCHEMA_VERSION
    assert tables
    for verb, table in tables.items():
        found = dict(config.settings(parsed(verb, "--config", path)))
        assert {k: found[k] for k in table} == table
    if name := tables.get("quantize", {}).get("reconstruction"):
        steps = [phase.steps for phase in LEARNED[name]().phases]
        assert max(steps) == tables["quantize"]["reconstruction-steps"]


def test_there_is_one_for_every_published_reconstruction():
    tables = [config.read_tables(path).get("quantize", {}) for path in PUBLISHED]
    assert {t["reconstruction"] for t in tables if "reconstruction" in t} == (
        set(LEARNED) - set(OURS)
    )
