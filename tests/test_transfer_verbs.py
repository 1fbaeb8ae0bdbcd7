"""`dfq adapt` and `dfq distill`: what learns in float, from whom, and what is refused."""

from typing import Any

import jax
import numpy as np
import PIL.Image
import pytest

import dfq_jax
from dfq_jax.api import transfer
from dfq_jax.api.given import MOST_PICTURES
from dfq_jax.errors import BudgetError, PlanError, UnsupportedModelError, UsageError
from dfq_jax.graph.graph import Model
from dfq_jax.graph.ops import GlobalAvgPool, Relu
from dfq_jax.io.artifacts.artifact import weights_sha256
from dfq_jax.io.load import load
from dfq_jax.io.zoo.untrained import untrained
from dfq_jax.quantization.plan import Rule
from dfq_jax.training.engine import TrainingReport
from dfq_jax.types import InputContract

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pictures(nets):
    return np.asarray(nets.images(nets.stem(), 24, seed=3))


@pytest.fixture(scope="module")
def taken(nets, pictures):
    return dfq_jax.adapt(nets.stem(), pictures, epochs=2, batch=8)


def test_a_network_adapts_before_it_is_quantized(nets, pictures, taken):
    source, made = nets.stem(), taken.float_model
    for slot in ("kernel", "bias"):
        np.testing.assert_array_equal(made.params["fc"][slot], source.params["fc"][slot])
    assert (
        np.abs(np.asarray(made.params["conv1"]["kernel"]) - source.params["conv1"]["kernel"]).max()
        > 0
    )
    assert taken.original == weights_sha256(source)
    assert taken.settings["adapted"] == "2 epochs of 18 images, 8 a step"
    assert any(note.startswith("adapted in 2 epochs") for note in taken.report.notes)
    assert len(taken.images) == 24
    np.testing.assert_array_equal(taken.probes.images, taken.images.images[-6:])


def test_what_judges_is_never_learned_from():
    read = InputContract(2, 2)
    count = 300
    values = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones(
        read.shape, np.float32
    )
    few, learned = transfer.set_apart(dfq_jax.Examples((jax.device_put(values),), (read,)))
    of = lambda v: np.asarray(v)[:, 0, 0, 0]
    assert len(few) == MOST_PICTURES
    judges = of(few.images)[-MOST_PICTURES // 4 :]
    assert len(learned) == count - len(judges)
    assert not np.isin(of(learned), judges).any()


def test_images_that_a_network_made_show_nothing_new(nets, tiny_net):
    made = dfq_jax.Examples((nets.images(tiny_net, 8),), tiny_net.inputs)
    with pytest.raises(UsageError, match="made from a network"):
        dfq_jax.adapt(tiny_net, made)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch": 64}, "takes 64 images a step and there are 18"),
        ({"batch": 8, "method": "zeroq"}, "makes images, and some were given"),
    ],
)
def test_what_cannot_adapt_is_refused(nets, pictures, told, message):
    with pytest.raises(UsageError, match=message):
        dfq_jax.adapt(nets.stem(), pictures, **told)


def test_the_command_needs_pictures_and_steps(dfq, made):
    found = dfq("adapt", made / "net.safetensors", "--arch", "small", "-o", made / "adapted")
    assert found.code == 2
    assert "give a folder or a zip of them with --images" in found.err
    found = dfq("adapt", made / "no.onnx", "-o", made / "x", "--images", made, "--epochs", 0)
    assert found.code == 2
    assert "epochs must be at least 1, got 0" in found.err  # before the model is looked for


@pytest.fixture
def heard(monkeypatch):
    """What `distill` has taught; the student stays as it began."""
    told: list[Any] = []

    def taught(student, teacher, method, setup):
        told.append((student, teacher, setup.images, setup.held_out, method))
        return student, TrainingReport(method.name, method.steps, 2.0, 1.0, True, 0.0, 0.0)

    monkeypatch.setattr(transfer, "distilled", taught)
    return told


def test_a_student_learns_from_its_teacher_and_is_judged_by_it(nets, tiny_net, heard):
    student, images = nets.tiny(seed=5), np.asarray(nets.images(tiny_net, 16))
    found = dfq_jax.distill(tiny_net, student, images, train=30, batch=4)
    ((begun, teacher, seen, held_out, method),) = heard
    assert teacher is tiny_net
    assert begun.inputs == tiny_net.inputs
    assert (len(seen), len(held_out)) == (12, 4)
    assert (method.steps, method.batch, method.images.warmup) == (30, 4, 3)
    assert found.float_model is begun
    assert found.original == weights_sha256(tiny_net)
    assert found.settings["distilled"] == "a network, 30 steps of 4 images, from its weights"
    exact, own = (np.asarray(dfq_jax.predict(m, held_out)) for m in (tiny_net, begun))
    far = np.mean((own - exact) ** 2) / np.mean(exact**2)
    assert found.report.sqnr < -10 * np.log10(far) + 1  # against the teacher
    assert "the student was taught 30 steps" in found.report.notes[-1]


def test_the_command_teaches_an_architecture_by_its_name(dfq, made, heard):
    out, net = made / "taught", (made / "net.safetensors", "--arch", "small")
    images = ("--images", made / "images.npz")
    line = ("distill", *net, "-o", out, "--student", "small", "--train", 20, *images)
    found = dfq(*line, "--json")
    assert found.code in (0, 4)  # drawn weights say nothing
    ((begun, teacher, *_),) = heard
    assert [n.name for n in begun.graph.nodes] == [n.name for n in teacher.graph.nodes]
    drawn, known = (np.asarray(m.params["conv1"]["kernel"]) for m in (begun, teacher))
    assert drawn.std() > 0
    assert np.abs(drawn - known).max() > 0.1
    assert "[distill]" in (out / "config.toml").read_text()
    assert 'student = "small"' in (out / "config.toml").read_text()


def test_students_that_do_not_fit_are_refused_before_any_work(nets, tiny_net, heard):
    with pytest.raises(UsageError, match=r"reads \(6, 6, 3\)"):
        dfq_jax.distill(tiny_net, nets.stem())
    with pytest.raises(UsageError, match="no built-in architecture is called"):
        dfq_jax.distill(tiny_net, "resnet21")
    with pytest.raises(UsageError, match="train must be at least 1"):
        dfq_jax.distill(tiny_net, nets.tiny(), train=0)
    assert not heard


@pytest.fixture(scope="module")
def short(nets):
    """Of the inputs and classes of `tiny`, with fewer layers, whose names differ."""
    b = nets.Builder(InputContract(8, 8), 1)
    x = b.op("relu1", Relu(), b.bn("bn1", b.conv("first", "images", 3, stride=2)))
    x = b.op("relu2", Relu(), b.bn("bn2", b.conv("second", x, 3, kernel=1)))
    return b.done(b.linear("fc", b.op("pool", GlobalAvgPool(), x), 5))


def test_rules_are_of_the_network_that_is_quantized(tiny_net, short, pictures, heard):
    of = lambda name: (Rule(name, weight_bits=8),)
    with pytest.raises(PlanError, match="'depthwise' matches no layer"):
        dfq_jax.distill(tiny_net, short, rules=of("depthwise"))
    with pytest.raises(PlanError, match="'first' matches no layer"):
        dfq_jax.adapt(tiny_net, pictures, rules=of("first"))
    assert not heard


def test_a_budget_is_of_the_network_that_is_quantized(tiny_net, short, pictures, monkeypatch):
    asked_for: list[Any] = []

    def seen_for(model, given, making, asked, follow):
        asked_for.append((model, asked.pipeline.budget))
        raise InterruptedError

    monkeypatch.setattr(transfer, "seen_for", seen_for)
    between = "0.3KB"  # the student can be so small, its teacher cannot
    with pytest.raises(BudgetError, match="out of reach"):
        dfq_jax.adapt(tiny_net, pictures, budget=between)
    with pytest.raises(BudgetError, match="out of reach"):
        dfq_jax.distill(tiny_net, short, budget="0.01KB")
    assert not asked_for
    with pytest.raises(InterruptedError):
        dfq_jax.distill(tiny_net, short, budget=between)
    assert asked_for == [(tiny_net, None)]


@pytest.mark.parametrize("name", ["resnet20_cifar", "squeezenet1_1", "densenet121"])
def test_an_architecture_without_weights_tells_apart_as_many_classes(name):
    """Written down by hand, and stored."""
    size = 32 if name == "resnet20_cifar" else 64
    made = untrained(name, InputContract(size, size), 7)
    assert isinstance(made, Model)
    shape = jax.eval_shape(
        lambda x: dfq_jax.predict(made, x), jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    )
    assert shape.shape == (1, 7)


def test_unknown_architectures_are_named():
    with pytest.raises(UnsupportedModelError, match="resnet"):
        untrained("resnet21", InputContract(32, 32), 7)


@pytest.mark.slow
def test_both_verbs_as_users_type_them(dfq, made, tmp_path):
    """Pictures in a folder; a generator and a student in turn; both folders verify."""
    rng = np.random.default_rng(0)
    for number in range(16):
        file = tmp_path / "pictures" / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file)
    net = (made / "net.safetensors", "--arch", "small")
    adapting = ("--images", tmp_path / "pictures", "--epochs", 2, "--batch", 4)
    assert dfq("adapt", *net, "-o", tmp_path / "adapted", *adapting).code in (0, 4)
    short = ("--train", 4, "--batch", 4, "--images", made / "images.npz")
    taught = dfq("distill", *net, "-o", tmp_path / "taught", "--student", "small", *short)
    assert taught.code in (0, 4)
    for name in ("adapted", "taught"):
        assert load(tmp_path / name / "float.onnx").model.graph.outputs
