"""Budgets of milliseconds: networks of several sizes are written and timed before one is chosen."""

import numpy as np
import onnx
import pytest

import dfq_jax as dfq
from dfq_jax.api import deadline as deadlines
from dfq_jax.api import quantize as quantizing
from dfq_jax.api.deadline import in_time, narrowed_to, stand_in
from dfq_jax.api.request import resolved
from dfq_jax.errors import BudgetError, UsageError
from dfq_jax.graph.coupling import coupled_channels
from dfq_jax.graph.query import macs
from dfq_jax.io.onnx.export import quantized_onnx, serialize
from dfq_jax.io.runtime.latency import median_ms
from dfq_jax.optim.progress import SILENT, Watcher
from dfq_jax.pruning.budget import Ceiling, Deadline, parse_structure
from dfq_jax.pruning.groups import Subject
from dfq_jax.pruning.prune import Pruning

HOW = Pruning(0.5, channels="all")


@pytest.fixture(scope="module")
def subject(tiny_net):
    return Subject(tiny_net)


@pytest.fixture(scope="module")
def asked(tiny_net):
    return resolved(tiny_net, {"scheme": "w8a8"})


@pytest.fixture
def by_weights(monkeypatch):
    """A machine that takes a millisecond for every thousand bytes of weights."""
    sizes = []

    def counted(data):
        stored = onnx.load_from_string(data).graph.initializer
        sizes.append(sum(len(t.raw_data) for t in stored if t.data_type == onnx.TensorProto.INT8))
        return sizes[-1] / 1000

    monkeypatch.setattr(deadlines, "median_ms", counted)
    return sizes


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("3ms", Deadline(3.0)), (" 2.5 MS", Deadline(2.5)), ("50% MACs", Ceiling(0.5, "macs", True))],
)
def test_deadlines_are_read(text, wanted):
    assert parse_structure(text) == wanted
    assert parse_structure(str(wanted)) == wanted


@pytest.mark.parametrize("text", ["0ms", "-1ms", "ms", "3s"])
def test_deadlines_that_are_none(text):
    with pytest.raises(BudgetError, match="budget"):
        parse_structure(text)


def test_the_most_work_that_is_fast_enough(subject, asked, by_weights):
    heard = []
    limit = Deadline(0.6 * whole_size(subject, asked) / 1000)
    found = in_time(subject, HOW, limit, asked, Watcher(stage=heard.append))
    assert found.unit == "macs"
    assert 0.1 < found.amount < 1
    fitting = max(size for size in by_weights if size / 1000 <= limit.ms)
    assert fitting > 0.4 * whole_size(subject, asked)
    assert "as it is" in heard[0]
    assert f"{limit} allow about" in heard[1]


def whole_size(subject, asked):
    kernels = [s["kernel"] for s in subject.folded.params.values() if "kernel" in s]
    return sum(k.size for k in kernels)


def test_what_is_fast_enough_loses_nothing(subject, asked, by_weights):
    found = in_time(subject, HOW, Deadline(1e6), asked, SILENT)
    assert found == Ceiling(1.0, "macs", relative=True)


def test_out_of_reach(subject, asked, by_weights):
    with pytest.raises(BudgetError, match=r"1e-05ms is out of reach .* takes [0-9.]+ ms"):
        in_time(subject, HOW, Deadline(1e-5), asked, SILENT)


def test_scales_of_groups_are_refused(subject, tiny_net):
    with pytest.raises(UsageError, match="scales for groups of inputs"):
        stand_in(subject, resolved(tiny_net, {"scheme": "w4g2"}))


def test_stand_ins_run_at_any_size(subject, asked):
    whole, coupled = stand_in(subject, asked), coupled_channels(subject.folded)
    kept = np.arange(len(coupled)) % 2 == 0
    small = narrowed_to(whole, coupled, kept)
    assert sum(macs(small.model).values()) < sum(macs(whole.model).values())
    assert median_ms(serialize(quantized_onnx(small)), runs=3) > 0


def test_compress_takes_a_deadline(tiny_net, by_weights, monkeypatch):
    monkeypatch.delattr(quantizing, "synthesize")  # told before images are made
    with pytest.raises(BudgetError, match="out of reach on this machine"):
        dfq.compress(tiny_net, budget="0.00001ms", channels="all")
