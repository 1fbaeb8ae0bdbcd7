"""Networks of tokens with their graph: imported, as long as rows may be, written, refused."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import onnx
import pytest

import dfq_jax as dfq
from dfq_jax.cli.app import main
from dfq_jax.errors import UnsupportedModelError, UsageError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.graph.graph import Model
from dfq_jax.graph.tasks import LanguageModel, task_of
from dfq_jax.io.artifacts.artifact import load_artifact
from dfq_jax.io.load import Loaded, load
from dfq_jax.io.onnx.export import float_onnx, serialize
from dfq_jax.io.runtime.session import feed, open_session
from dfq_jax.types import TokenColumns, Tokens

torch = pytest.importorskip("torch")
nets = pytest.importorskip("token_nets")
pytestmark = [pytest.mark.torch, pytest.mark.onnx]

NETWORKS: dict[str, tuple[Callable[[], Any], int]] = {
    "encoder": (lambda: nets.made(nets.Encoder), 3),
    "widened": (lambda: nets.made(nets.Encoder, widened=True), 3),
    "attending": (lambda: nets.made(nets.Attending), 2),
    "padded": (lambda: nets.made(nets.Padded), 2),
    "decoder": (lambda: nets.made(nets.Decoder), 1),
    "llama": (lambda: nets.made(nets.Llama), 1),
    "own": (lambda: nets.made(nets.Llama, own=True), 1),
}
"""{name: (the network, its inputs)}."""
QUICK = (
    *(f"{name}-onnx" for name in ("encoder", "widened", "padded", "decoder", "llama")),
    *("attending-pt2", "own-pt2"),
)
"""The files that every run reads; PyTorch takes seconds to write an archive."""
NAMED = [f"{n}-{k}" for n in NETWORKS for k in ("pt2", "onnx") if (n, k) != ("own", "onnx")]
FILES = [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in NAMED]


def read(folder, name: str, kind: str, *, free: bool = True, **how: Any) -> tuple[Any, Loaded]:
    make, count = NETWORKS[name]
    net, path = make(), folder / f"{name}.{kind}"
    if kind == "pt2":
        path.write_bytes(nets.exported(net, count, free=free))
    else:
        nets.onnx_file(path, net, count, free=free, **how)
    return net, load(path)


def of_length(model: Model, length: int) -> Model:
    assert isinstance(model.input, Tokens | TokenColumns)
    return dataclasses.replace(model, inputs=(model.input.of_length(length),))


def parity(net: Any, model: Model, file: Any) -> None:
    """PyTorch, the imported network and its file compute the same of the same rows."""
    x = np.asarray(model.input.example(jax.random.key(0), 2))
    columns = np.moveaxis(x, -1, 0) if x.ndim == 3 else x[None]
    with torch.no_grad():
        theirs = net(*(torch.tensor(c).long() for c in columns))
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    ours, written = evaluate(model, jax.numpy.asarray(x))[0], file.run(None, feed(file, x))
    for wanted, mine, filed in zip(theirs, ours, written, strict=True):
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(filed, wanted.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", FILES)
def test_rows_of_any_length_are_read_and_written(tmp_path, named):
    name, kind = named.split("-")
    net, loaded = read(tmp_path, name, kind)
    model = loaded.model
    file = open_session(serialize(float_onnx(model)), optimize=False)
    assert all(x.shape == ["N", "sequence"] for x in file.get_inputs())
    assert [x.name for x in file.get_inputs()] == list(nets.NAMES[: NETWORKS[name][1]])
    for length in (5, 11):
        parity(net, of_length(model, length), file)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_padding_may_be_told_by_ids(tmp_path, kind):
    """A mask that is written for one head and read by all."""
    net, path = nets.made(nets.Classifier), tmp_path / f"net.{kind}"
    if kind == "pt2":
        path.write_bytes(nets.exported(net, 1, free=False))
    else:
        nets.onnx_file(path, net, 1, free=False)
    model = load(path).model
    x = np.array(model.input.example(jax.random.key(0), 2))
    x[0, 4:], x[1, 2:] = 0, 0
    with torch.no_grad():
        wanted = net(torch.tensor(x).long()).numpy()
    file = open_session(serialize(float_onnx(model)), optimize=False)
    (ours,), _ = evaluate(model, jax.numpy.asarray(x))
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(file.run(None, feed(file, x))[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_length_that_is_free_by_name_only_is_the_one_of_its_shapes(tmp_path):
    path = tmp_path / "net.onnx"
    nets.onnx_file(path, nets.made(nets.Classifier), 1, free=True)
    loaded = load(path)
    assert loaded.model.input == Tokens(6, 40)
    assert any("rows of 6 tokens only" in note for note in loaded.notes)


def test_what_the_inputs_hold_is_told_by_what_is_done_with_them(tmp_path):
    _, loaded = read(tmp_path, "encoder", "onnx", free=False)
    assert loaded.model.inputs == (
        TokenColumns(nets.NAMES, (Tokens(6, 40), Tokens(6, mask=True), Tokens(6, 2))),
    )
    _, loaded = read(tmp_path, "decoder", "pt2", free=False)
    assert loaded.model.inputs == (Tokens(6, 40),)
    assert task_of(loaded.model) == LanguageModel()


def test_what_was_exported_for_one_length_keeps_it(tmp_path):
    net, loaded = read(tmp_path, "encoder", "onnx", free=False, opset=13)
    file = open_session(serialize(float_onnx(loaded.model)), optimize=False)
    assert [x.shape for x in file.get_inputs()] == [["N", 6]] * 3
    parity(net, loaded.model, file)
    with pytest.raises(UsageError, match="exported for rows of 6 tokens, not 7"):
        load(tmp_path / "encoder.onnx", size=7)


def kinds(model: Model) -> list[str]:
    return [type(node.op).__name__ for node in model.graph.nodes]


def test_norms_curves_and_masks_are_found_where_they_are_spelled_out(tmp_path):
    _, encoder = read(tmp_path, "encoder", "onnx", opset=13)
    assert kinds(encoder.model).count("LayerNorm") == 3
    assert "Select" in kinds(encoder.model)  # no mask is added to scores
    _, llama = read(tmp_path, "llama", "onnx")
    assert kinds(llama.model).count("RmsNorm") == 3
    assert kinds(llama.model).count("Compare") == 1  # no square of places is kept
    _, decoder = read(tmp_path, "decoder", "onnx")
    curves = [getattr(node.op, "curve", "") for node in decoder.model.graph.nodes]
    assert "gelu_tanh" in curves


def test_rows_end_where_the_table_of_places_does(tmp_path):
    _, loaded = read(tmp_path, "decoder", "onnx")
    assert any("exported files read up to 24" in note for note in loaded.notes)
    assert load(tmp_path / "decoder.onnx", size=24).model.input.shape == (24,)
    with pytest.raises(UnsupportedModelError, match="24"):
        load(tmp_path / "decoder.onnx", size=25)
    with pytest.raises(UsageError, match="length of rows of tokens"):
        load(tmp_path / "decoder.onnx", size=(8, 9))
    with pytest.raises(UsageError, match="tokens, no images: leave out `layout=`"):
        load(tmp_path / "decoder.onnx", layout="nchw")
    with pytest.raises(UsageError, match="leave out `mean=`"):
        load(tmp_path / "decoder.onnx", mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("name", ["attending", pytest.param("encoder", marks=pytest.mark.slow)])
def test_several_inputs_are_quantized_verified_and_read_again(tmp_path, name):
    _, loaded = read(tmp_path, name, "onnx")
    model = of_length(loaded.model, 6)
    made = dfq.quantize(model, n=8)
    found = made.verify()
    assert found.passed, found.failures
    assert found.most_steps <= 1
    assert made.report.coverage == 1.0
    made.save(tmp_path / "out", verification=found)
    again = load_artifact(tmp_path / "out")
    assert again.quantized.model.inputs == model.inputs
    file = onnx.load_model(again.onnx_path)
    sizes = {x.name: [d.dim_param for d in x.type.tensor_type.shape.dim] for x in file.graph.input}
    assert sizes == {fed: ["N", "sequence"] for fed in nets.NAMES[: NETWORKS[name][1]]}
    assert dfq.verify(tmp_path / "out").passed
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(tmp_path / "out")])
    assert caught.value.code == 0


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        (0, 40, "row 1 has 40 in input_ids at 2; its numbers are 0 to 39"),
        (2, 2, "row 1 has 2 in token_type_ids at 2; its numbers are 0 to 1"),
        (1, None, "row 1 has an empty attention_mask"),
    ],
)
def test_rows_that_are_none_are_refused(tmp_path, column, value, told):
    _, loaded = read(tmp_path, "encoder", "onnx", free=False)
    rows = np.stack([x.numpy() for x in nets.rows(3, batch=4)], -1)
    rows[1, slice(None) if value is None else 2, column] = value or 0
    with pytest.raises(UsageError, match=told):
        dfq.quantize(loaded.model, rows)


class Counted(torch.nn.Module):
    """Computes with ids."""

    def forward(self, input_ids: Any) -> Any:
        return torch.nn.functional.embedding(input_ids + 1, torch.eye(50))


def test_what_computes_with_ids_is_refused_by_name(tmp_path):
    path = tmp_path / "net.pt2"
    path.write_bytes(nets.exported(Counted().eval(), 1, free=False))
    with pytest.raises(UnsupportedModelError, match="places that the network computes"):
        load(path)


class Pairs(torch.nn.Module):
    """A user and an item, one number each."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = torch.nn.Embedding(30, 8), torch.nn.Embedding(50, 8)
        self.score = torch.nn.Linear(16, 2)

    def forward(self, user: Any, item: Any) -> Any:
        return self.score(torch.cat([self.users(user), self.items(item)], 1))


class Fields(torch.nn.Module):
    """A table for each of a row's fields."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torch.nn.ModuleList(torch.nn.Embedding(n, 4) for n in (20, 7))
        self.score = torch.nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        found = [table(x[:, k]) for k, table in enumerate(self.tables)]
        return self.score(torch.cat(found, 1))


class Marked(torch.nn.Module):
    """Bytes as rows of zeros and a one."""

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(9, 3)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.score(torch.nn.functional.one_hot(x, 9).float())).mean(1)


def test_one_hot_of_pytorch_is_looked_up(tmp_path):
    net, path = nets.made(Marked), tmp_path / "net.pt2"
    path.write_bytes(nets.exported(net, 1, free=False))
    loaded = load(path)
    assert loaded.model.inputs == (Tokens(6, 9),)
    assert "Embed" in kinds(loaded.model)
    assert "Linear" not in kinds(loaded.model)
    parity(net, loaded.model, open_session(serialize(float_onnx(loaded.model)), optimize=False))


def recommender(folder, kind: type, *given: Any) -> Loaded:
    path, names = folder / "net.onnx", ["user", "item"][: len(given)]
    free = {name: {0: "n"} for name in names}
    how = {"dynamo": False, "opset_version": 17, "input_names": names, "dynamic_axes": free}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(nets.made(kind), given, path, **how)
    return load(path)


def test_numbers_of_users_and_items_are_read(tmp_path):
    ids = torch.zeros(2, dtype=torch.int64)
    loaded = recommender(tmp_path, Pairs, ids, ids)  # compared with its file while it is read
    assert loaded.model.inputs == (TokenColumns(("user", "item"), (Tokens(1, 30), Tokens(1, 50))),)
    assert any("exported files read them as (batch, 1)" in note for note in loaded.notes)
    file = open_session(serialize(float_onnx(loaded.model)), optimize=False)
    assert [x.shape for x in file.get_inputs()] == [["N", 1]] * 2


def test_fields_look_up_tables_of_their_own(tmp_path):
    loaded = recommender(tmp_path, Fields, torch.zeros(2, 2, dtype=torch.int64))
    assert loaded.model.inputs == (Tokens(2, 7),)
    assert any("tables of 7, 20 rows" in note for note in loaded.notes)


def test_a_classifier_of_ids_is_quantized_from_the_command_line(tmp_path, capsys):
    recommender(tmp_path, Fields, torch.zeros(2, 2, dtype=torch.int64))
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as caught:
        main(["quantize", str(tmp_path / "net.onnx"), "-o", str(out), "--n", "8"])
    assert caught.value.code == 0
    assert "verified against ONNX Runtime" in capsys.readouterr().out
