"""The `tfds:` specs, on data sets prepared here: tiny, local, and without TensorFlow."""

import io
import socket
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from dfq_jax.data.sources import open_source
from dfq_jax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")


def encoded(shade: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, (8, 6), shade if mode == "L" else (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def prepare(name: str, features: dict, splits: dict, data_dir: Path, supervised=None) -> None:
    """Writes a data set as array_record; `splits` maps a name to a list of examples."""

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description="For tests.",
            homepage="https://example.org",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=supervised,
        )

    methods = {
        "VERSION": tfds.core.Version("1.0.0"),
        "pkg_dir_path": None,
        "name": name,
        "_info": info,
        "_split_generators": lambda self, _: {k: enumerate(v) for k, v in splits.items()},
        "_generate_examples": lambda self: iter(()),
    }
    with tfds.core.registered.skip_registration():
        builder = type("Tiny", (tfds.core.GeneratorBasedBuilder,), methods)
        builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


def image_feature(**options):
    return tfds.features.Image(shape=(None, None, 3), encoding_format="png", **options)


def example(shade: int, label: int, **more) -> dict:
    return {"image": io.BytesIO(encoded(shade)), "label": label, **more}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    tfds.disable_progress_bar()
    root = tmp_path_factory.mktemp("tfds")
    names = tfds.features.ClassLabel(names=["zebra", "ant", "moth"])
    plain = {"image": image_feature(), "label": names}
    rows = lambda count: [example(10 * i, i % 3) for i in range(count)]
    prepare("tiny", plain, {"train": rows(2), "test": rows(7)}, root)
    prepare(
        "two_labels",
        {**plain, "coarse": tfds.features.ClassLabel(num_classes=2)},
        {"validation": [example(0, 2, coarse=1)]},
        root,
        supervised=("image", "label"),
    )
    prepare("only_train", plain, {"train": rows(2)}, root)
    prepare("hidden", plain, {"test": [example(0, -1)]}, root)
    prepare(
        "no_label", {"image": image_feature()}, {"test": [{"image": example(0, 0)["image"]}]}, root
    )
    return root


@pytest.fixture(autouse=True)
def _environment(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))


def test_examples_labels_and_class_order():
    source = open_source("tfds:tiny")
    assert (source.name, source.kind, len(source)) == ("tfds:tiny:test", "dataset", 7)
    assert source.classes == ("zebra", "ant", "moth")
    seen = {int(np.asarray(image)[0, 0, 0]): label for image, label in source}
    assert seen == {10 * i: i % 3 for i in range(7)}
    assert source[0][0].size == (8, 6)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["tiny", "cifar10"])
def test_the_network_is_never_asked(monkeypatch, name):
    def connect(*args):
        raise AssertionError(f"connection attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    if name == "tiny":
        assert open_source("tfds:tiny")[0][1] in (0, 1, 2)
    else:
        with pytest.raises(DataError, match=r"tfds\.builder\('cifar10', .*array_record"):
            open_source("tfds:cifar10")


def test_order_is_the_same_every_time():
    shades = [np.asarray(image)[0, 0, 0] for image, _ in open_source("tfds:tiny")]
    again = [np.asarray(image)[0, 0, 0] for image, _ in open_source("tfds:tiny:test")]
    assert shades == again


@pytest.mark.parametrize(
    ("spec", "size"),
    [("tiny:train", 2), ("tiny:test[:3]", 3), ("tiny:train+test", 9)],
)
def test_splits_may_be_sliced_and_added(spec, size):
    assert len(open_source(f"tfds:{spec}")) == size


def test_supervised_keys_choose_between_two_labels():
    source = open_source("tfds:two_labels")
    assert source.name == "tfds:two_labels:validation"
    assert source.classes == ("zebra", "ant", "moth")
    assert source[0][1] == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("absent", r"cannot open tfds data set 'absent'[\s\S]*download_and_prepare\(\)"),
        ("", r"cannot open tfds data set ''"),
        ("no spaces allowed", "cannot open tfds data set"),
        ("tiny:holdout", r"no split 'holdout', it has .*test"),
        ("only_train", r"neither a test nor a validation split; .*tfds:only_train:train"),
        ("no_label", "1 image and 0 class label features among image"),
    ],
)
def test_errors_name_the_data_set_and_the_remedy(spec, message):
    with pytest.raises(DataError, match=message):
        open_source(f"tfds:{spec}")


def test_a_split_without_labels_is_refused_when_read():
    with pytest.raises(DataError, match=r"example 0 of tfds:hidden:test has no label"):
        open_source("tfds:hidden")[0]


def test_a_format_without_random_access_is_explained(data_dir, tmp_path, monkeypatch):
    target = tmp_path / "tiny" / "1.0.0"
    target.mkdir(parents=True)
    for path in (data_dir / "tiny" / "1.0.0").iterdir():
        name = path.name.replace("array_record", "tfrecord")
        text = path.read_bytes().replace(b"array_record", b"tfrecord")
        (target / name).write_bytes(text)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"without random access[\s\S]*file_format='array_record'"):
        open_source("tfds:tiny")


def test_a_missing_installation_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'dfq-jax\[data\]'"):
        open_source("tfds:tiny")
