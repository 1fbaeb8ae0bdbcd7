"""`evaluate` against a plain NumPy count, and its handling of batches, ties, NaNs and classes."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfq_jax.data.accuracy import Accuracy, class_indices, count_hits, measured_accuracy, pick
from dfq_jax.data.source import LabelledImages
from dfq_jax.errors import DataError, UsageError
from dfq_jax.types import InputContract

CONTRACT = InputContract(2, 2, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def indexed(labels, classes) -> LabelledImages:
    """Images whose red value is their index, so that a predictor can look up any answer."""

    def read(i):
        return PIL.Image.new("RGB", (2, 2), (i, 0, 0)), int(labels[i])

    return LabelledImages("memory", tuple(f"c{i:03d}" for i in range(classes)), len(labels), read)


def table(scores):
    """A predictor that returns row `red value` of `scores`."""
    return lambda images: scores[np.round(np.asarray(images)[:, 0, 0, 0] * 255).astype(int)]


def reference(scores, labels) -> tuple[float, float]:
    """Stable sort, best first; a NaN row never counts."""
    top1 = top5 = 0
    for row, label in zip(scores, labels, strict=True):
        if not np.isnan(row).any():
            order = sorted(range(len(row)), key=lambda c: (-row[c], c))
            top1 += order[0] == label
            top5 += label in order[:5]
    return top1 / len(labels), top5 / len(labels)


@pytest.mark.parametrize("batch", [1, 7, 50, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.float16])
def test_equals_a_plain_count(batch, dtype):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 50)
    scores = (rng.normal(size=(50, 12)) * 3).astype(dtype)  # integers: many ties
    got = measured_accuracy(table(scores), indexed(labels, 12), CONTRACT, batch=batch)
    assert (got.top1, got.top5) == pytest.approx(reference(scores.astype(float), labels))
    assert got.n == 50
    assert got.to_dict() == {"top1": got.top1, "top5": got.top5, "n": 50}


@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, np.inf, -np.inf, np.nan]), min_size=7, max_size=7),
        min_size=1,
        max_size=8,
    ),
    st.data(),
)
def test_counting_agrees_with_argmax_and_stable_sort(rows, data):
    scores = np.array(rows)
    labels = np.array([data.draw(st.integers(0, 6)) for _ in rows])
    hits = count_hits(scores, labels)
    top1, top5 = reference(scores, labels)
    np.testing.assert_allclose(hits / len(rows), [top1, top5])
    whole = ~np.isnan(scores).any(axis=1)
    assert hits[0] == (whole & (scores.argmax(axis=1) == labels)).sum()


def test_nan_scores_are_wrong_and_ties_go_to_the_first_class():
    scores = np.array([[np.nan, 0, 0], [0, np.nan, 9], [1, 1, 1], [1, 1, 1.0]])
    got = measured_accuracy(table(scores), indexed([0, 2, 0, 1], 3), CONTRACT)
    assert got == Accuracy(0.25, 0.5, 4)


def test_fewer_than_five_classes_are_all_in_the_top_five():
    scores = np.array([[3.0, 2, 1], [3, 2, 1]])
    assert measured_accuracy(table(scores), indexed([2, 1], 3), CONTRACT) == Accuracy(0.0, 1.0, 2)


def test_a_jitted_network_compiles_once():
    traces = []

    @jax.jit
    def predict(images):
        traces.append(images.shape)
        return jax.nn.one_hot(jnp.round(images[:, 0, 0, 0] * 255).astype(jnp.int32) % 5, 5)

    source = indexed(np.arange(23) % 5, 5)
    assert measured_accuracy(predict, source, CONTRACT, batch=10) == Accuracy(1.0, 1.0, 23)
    assert traces == [(10, 2, 2, 3)]


def test_padding_rows_are_zero_and_ignored():
    seen = []

    def predict(images):
        seen.append(images.copy())
        return np.eye(2)[np.zeros(len(images), int)]

    assert measured_accuracy(predict, indexed([0, 0, 0], 2), CONTRACT, batch=2).n == 3
    assert [len(images) for images in seen] == [2, 2]
    assert not seen[1][1].any()


def test_the_next_batch_is_decoded_while_the_current_one_is_computed():
    """`predict` waits for reads that only another thread can make."""
    second = threading.Event()
    inner = indexed([0] * 4, 2)

    def read(i):
        if i >= 2:
            second.set()
        return inner.read(i)

    def predict(images):
        assert second.wait(timeout=20)
        return np.eye(2)[np.zeros(len(images), int)]

    source = LabelledImages("memory", inner.classes, 4, read)
    assert measured_accuracy(predict, source, CONTRACT, batch=2).top1 == 1.0


def test_progress_reports_running_top1():
    calls = []
    scores = np.eye(2)[[0, 0, 1]]
    source = indexed([0, 1, 1], 2)
    report = lambda *args: calls.append(args)
    measured_accuracy(table(scores), source, CONTRACT, batch=2, on_batch=report)
    assert calls == [(2, 3, 0.5), (3, 3, pytest.approx(2 / 3))]


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_limit_takes_evenly_spaced_examples(size, limit):
    chosen = pick(size, limit)
    assert len(chosen) == min(size, limit)
    assert chosen[0] == 0
    assert chosen[-1] < size
    gaps = np.diff([*chosen, size])
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


def test_a_limit_keeps_every_class():
    labels = np.repeat(np.arange(10), 20)
    seen = []
    source = indexed(labels, 10)
    spied = LabelledImages("m", source.classes, 200, lambda i: (seen.append(i), source.read(i))[1])
    result = measured_accuracy(table(np.eye(10)[labels]), spied, CONTRACT, limit=10)
    assert result == Accuracy(1.0, 1.0, 10)
    assert sorted(labels[i] for i in seen) == list(range(10))
    assert measured_accuracy(table(np.eye(10)[labels]), source, CONTRACT, limit=999).n == 200


def folder(classes) -> LabelledImages:
    source = indexed([0], 1)
    return LabelledImages("here", tuple(classes), 1, source.read, "folder")


@pytest.mark.parametrize(("classes", "outputs"), [(999, 1000), (1000, 999), (1, 2)])
def test_class_counts_must_agree(classes, outputs):
    message = f"network has {outputs} outputs, folder has {classes} classes: here"
    source = folder(f"n{i}" for i in range(classes))
    with pytest.raises(DataError, match=message):
        measured_accuracy(lambda images: np.zeros((len(images), outputs)), source, CONTRACT)


@pytest.mark.parametrize(
    ("names", "outputs", "expected"),
    [
        (("cat", "dog"), 2, [0, 1]),
        (("17", "3", "5"), 1000, [17, 3, 5]),
        (("0", "1", "10", "2"), 11, [0, 1, 10, 2]),
        (("0003", "0017"), 1000, [3, 17]),
        (("1", "2", "3"), 3, [0, 1, 2]),  # counted from one: no output 3, so sorted order
        (("01", "1"), 2, [0, 1]),
    ],
)
def test_integer_class_names_are_outputs(names, outputs, expected):
    assert class_indices(folder(names), outputs).tolist() == expected


@pytest.mark.parametrize("names", [("1", "2", "30"), ("9" * 5000, "1"), ("²", "1"), ("a", "1")])
def test_class_names_out_of_range_do_not_excuse_a_wrong_count(names):
    with pytest.raises(DataError, match="outputs, folder has"):
        class_indices(folder(names), 20)


def test_integer_folders_score_against_their_own_output():
    inner = indexed([0, 1], 2)
    source = LabelledImages("here", ("7", "9"), 2, inner.read, "folder")
    assert measured_accuracy(table(np.eye(10)[[7, 9]]), source, CONTRACT).top1 == 1.0


@pytest.mark.parametrize("options", [{"limit": 0}, {"limit": -3}, {"batch": 0}])
def test_senseless_numbers_are_refused(options):
    with pytest.raises(UsageError, match="batch and limit >= 1"):
        measured_accuracy(table(np.eye(2)), indexed([0, 1], 2), CONTRACT, **options)


@pytest.mark.parametrize("shape", [(4,), (3, 2), (4, 2, 1), (4, 0)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(UsageError, match=r"scores of shape \(4, classes\)"):
        measured_accuracy(lambda _: np.zeros(shape), indexed([0, 1], 2), CONTRACT, batch=4)


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="dataset memory is empty"):
        measured_accuracy(table(np.eye(2)), indexed([], 2), CONTRACT)


def test_reading_errors_arrive_and_name_the_image():
    def read(i):
        image = PIL.Image.new("F" if i == 3 else "RGB", (2, 2))
        return image, 0

    source = LabelledImages("memory", ("a", "b"), 6, read)
    with pytest.raises(DataError, match=r"example 3 of memory: .*float pixels"):
        measured_accuracy(lambda images: np.zeros((len(images), 2)), source, CONTRACT, batch=2)


def test_errors_of_the_network_pass_through():
    def predict(images):
        raise FloatingPointError("overflow")

    with pytest.raises(FloatingPointError, match="overflow"):
        measured_accuracy(predict, indexed([0] * 9, 2), CONTRACT, batch=2)
