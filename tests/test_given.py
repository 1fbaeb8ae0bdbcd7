"""Images that users bring: pictures, arrays, sets; what is said of them, and what is refused."""

import dataclasses
import zipfile
from typing import Any

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

import dfq_jax as dfq
from dfq_jax.api.given import MOST_PICTURES, image_set
from dfq_jax.errors import DataError, UsageError
from dfq_jax.examples import Examples
from dfq_jax.io.artifacts.images import save_images
from dfq_jax.optim.progress import Watcher
from dfq_jax.report.html import report_html
from dfq_jax.report.terminal import trust_lines
from dfq_jax.types import InputContract

CONTRACT = InputContract(8, 6)
GREY = InputContract(8, 6, (0.5,), (0.25,))
MEAN, STD = (np.array(v, np.float32) for v in (CONTRACT.mean, CONTRACT.std))


def pixels(n=5, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 8, 6, channels), np.uint8)


def understood(given, contract=CONTRACT):
    """The images and the one line that is told."""
    notes = []
    found = image_set(given, contract, notes.append)
    assert found.given
    assert found.contract == contract
    assert len(notes) == 1
    return np.asarray(found.images), notes[0]


def right(values):
    return (values.astype(np.float32) / 255 - MEAN) / STD


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of the network's size, some deeper, some in classes, and other files."""
    root = tmp_path / "pictures"
    for index, image in enumerate(pixels(7)):
        place = root / ("cat", "dog/deep", "")[index % 3]
        place.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(place / f"{index}.png")
    (root / "notes.txt").write_text("none")
    (root / ".hidden.png").write_text("none")
    return root


def sorted_rows(images: np.ndarray) -> np.ndarray:
    order = sorted(range(len(images)), key=lambda row: images[row].ravel().tolist())
    return images[order]


def test_pictures_anywhere_in_a_folder(folder):
    found, told = understood(folder)
    np.testing.assert_allclose(sorted_rows(found), sorted_rows(right(pixels(7))), atol=1e-6)
    assert "7 pictures" in told
    assert "mean 0.485,0.456,0.406, std 0.229,0.224,0.225" in told
    again, _ = understood(str(folder))
    np.testing.assert_array_equal(found, again)


def test_pictures_in_a_zip(folder, tmp_path):
    path = tmp_path / "pictures.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    np.testing.assert_array_equal(understood(path)[0], understood(folder)[0])


def test_of_many_pictures_some_are_taken_evenly(tmp_path):
    for index in range(MOST_PICTURES + 20):
        shade = np.full((8, 6), index % 256, np.uint8)
        PIL.Image.fromarray(shade).save(tmp_path / f"{index}.png")
    found, told = understood(tmp_path, GREY)
    assert len(found) == MOST_PICTURES
    assert f"{MOST_PICTURES} of {MOST_PICTURES + 20} pictures, evenly spaced," in told


def test_pictures_of_other_sizes_and_colours_are_brought_to_the_networks(tmp_path):
    PIL.Image.fromarray(np.full((30, 50), 128, np.uint8)).save(tmp_path / "a.png")
    found, _ = understood(tmp_path)
    np.testing.assert_allclose(found, right(np.full((1, 8, 6, 3), 128)), atol=1e-6)


def test_a_damaged_picture_is_named(folder):
    (folder / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bad\.png"):
        image_set(folder, CONTRACT)


FORMS = {
    "pixels": (lambda p: p, "of pixels 0..255"),
    "wide pixels": (lambda p: p.astype(np.int64), "of pixels 0..255"),
    "float pixels": (lambda p: p.astype(np.float64), "of pixels 0..255"),
    "shares": (lambda p: p.astype(np.float32) / 255, r"of pixels in [0, 1]"),
    "normalised": (right, "taken as normalised already"),
    "half": (lambda p: right(p).astype(np.float16), "taken as normalised already"),
    "channels first": (lambda p: p.transpose(0, 3, 1, 2), "of pixels 0..255"),
    "jax": (lambda p: jnp.asarray(right(p)), "taken as normalised already"),
}


@pytest.mark.parametrize("form", FORMS)
def test_arrays_are_understood_and_told(form):
    make, message = FORMS[form]
    found, told = understood(make(pixels()))
    np.testing.assert_allclose(found, right(pixels()), atol=2e-3 if form == "half" else 1e-6)
    assert message in told
    assert "mean 0.485,0.456,0.406, std 0.229,0.224,0.225" in told


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("low", "high"), [(-12.0, 2.0), (4.0, 90.0), (0.0, 1.0), (-3, 300)])
def test_lines_are_read_as_files_have_them_and_values_stay(layout, low, high):
    """7 steps of 5 values, which are no pixels whatever they are."""
    contract = InputContract(1, 7, (0.5,) * 5, (0.5,) * 5, assumed=True, layout=layout)
    lines = np.random.default_rng(0).uniform(low, high, (4, 7, 5)).astype(type(low))
    wanted = lines[:, None].astype(np.float32)
    for given in (lines, lines.transpose(0, 2, 1), lines[:, None]):
        found, told = understood(given, contract)
        np.testing.assert_array_equal(found, wanted)
        assert told.endswith("as they are")


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_square_lines_are_those_of_the_file(layout):
    contract = InputContract(1, 5, (0.5,) * 5, (0.5,) * 5, layout=layout)
    lines = np.random.default_rng(0).normal(size=(2, 5, 5))
    wanted = lines if layout == "NHWC" else lines.transpose(0, 2, 1)
    np.testing.assert_allclose(understood(lines, contract)[0][:, 0], wanted, rtol=1e-6)


def test_vectors_and_spectra():
    vector = InputContract(1, 1, (0.5,) * 9, (0.5,) * 9)
    values = np.linspace(-4, 200, 27).reshape(3, 9)
    np.testing.assert_allclose(understood(values, vector)[0][:, 0, 0], values, rtol=1e-6)
    with pytest.raises(UsageError, match=r"or as its file has them \(NCHW\)"):
        understood(np.zeros((3, 8)), vector)
    spectra = np.linspace(4.4, 11.3, 96).reshape(2, 8, 6)  # no pixels of 0..255
    found, told = understood(spectra, GREY)
    np.testing.assert_allclose(found[..., 0], spectra, rtol=1e-6)
    assert "taken as normalised already" in told


def test_grey_images_and_a_single_one():
    np.testing.assert_allclose(
        understood(pixels(3, 1)[..., 0], GREY)[0], (pixels(3, 1) / 255 - 0.5) / 0.25, atol=1e-6
    )
    assert understood(pixels(1)[0])[0].shape == (1, 8, 6, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((2, 6, 8, 3), np.uint8),
            r"shape \(2, 6, 8, 3\); the network reads \(n, 8, 6, 3\)",
        ),
        (np.zeros((0, 8, 6, 3), np.uint8), "shape"),
        (np.full((2, 8, 6, 3), 300), "values from 300 to 300"),
        (np.full((2, 8, 6, 3), -1), "values from -1 to -1"),
        (np.full((2, 8, 6, 3), np.nan), "NaN or infinite"),
        (np.zeros((2, 8, 6, 3), bool), "no numbers"),
        (np.zeros(3), "shape"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(UsageError, match=message):
        image_set(array, CONTRACT)


@pytest.mark.parametrize("ending", ["npz", "npy"])
def test_files_of_arrays(tmp_path, ending):
    path = tmp_path / f"set.{ending}"
    if ending == "npz":
        np.savez(path, images=right(pixels()), labels=np.arange(5))
    else:
        np.save(path, right(pixels()))
    found, told = understood(path)
    np.testing.assert_array_equal(found, right(pixels()))
    assert str(path) in told


def test_sets_made_here_stay_what_they_are(tmp_path):
    made = Examples((jnp.asarray(right(pixels())),), (CONTRACT,), {"method": "dsg"})
    save_images(tmp_path / "set.npz", made)
    notes = []
    found = image_set(tmp_path / "set.npz", CONTRACT, notes.append)
    assert (found.given, found.provenance, notes) == (False, {"method": "dsg"}, [])
    assert image_set(made, CONTRACT) is made


@pytest.mark.parametrize("ending", ["npz", "npy"])
@pytest.mark.parametrize("key", ["images", "contract"])
def test_nobody_is_told_to_load_pickles(tmp_path, ending, key):
    path = tmp_path / f"set.{ending}"
    objects = np.array([{"a": 1}], object)
    if ending == "npz":
        arrays: dict[str, Any] = {"images": pixels(), key: objects}
        arrays |= {"provenance": np.array("{}")} if key == "contract" else {}
        np.savez(path, **arrays)
    else:
        np.save(path, objects)
    with pytest.raises(DataError) as told:
        image_set(path, CONTRACT)
    assert "Python objects, which are never read" in str(told.value)
    assert "allow_pickle" not in str(told.value)


def test_other_files_are_refused_with_what_to_give(tmp_path):
    np.savez(tmp_path / "x.npz", x=pixels())
    with pytest.raises(DataError, match="holds x; images lie under the key `images`"):
        image_set(tmp_path / "x.npz", CONTRACT)
    (tmp_path / "words.txt").write_text("none")
    with pytest.raises(UsageError, match="holds no images; give a folder or a zip of pictures"):
        image_set(tmp_path / "words.txt", CONTRACT)
    PIL.Image.fromarray(pixels()[0]).save(tmp_path / "one.png")
    with pytest.raises(UsageError, match="is one picture; give a folder"):
        image_set(tmp_path / "one.png", CONTRACT)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        image_set(tmp_path / "empty", CONTRACT)
    (tmp_path / "unfinished").mkdir()
    np.savez(tmp_path / "unfinished" / "shard-00000-of-00002.npz", images=right(pixels()))
    with pytest.raises(DataError, match="not a finished set"):
        image_set(tmp_path / "unfinished", CONTRACT)
    with pytest.raises(DataError, match="dfq synthesize"):
        image_set(tmp_path / "missing.npz", CONTRACT)


@pytest.fixture(scope="module")
def network(nets):
    return nets.stem()


@pytest.fixture(scope="module")
def ran(network):
    """(result, lines told) of W8A8 with preset fast, on an array of images."""
    told = []
    shape = (12, *network.contract.shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return dfq.quantize(network, images, watch=Watcher(told.append)), told


def test_what_a_preset_does_not_look_at_is_said_in_one_line(ran):
    result, told = ran
    about = [note for note in result.report.notes if "only judge the result" in note]
    assert len(about) == 1
    assert "the 12 images you gave" in about[0]
    assert '`preset="balanced"`' in about[0]
    assert any("of pixels 0..255, normalised with" in line for line in told)


def test_images_given_are_not_called_synthetic(ran):
    result, _ = ran
    page = report_html(result.report, result.images, result.settings).decode().lower()
    lines = "\n".join(trust_lines(result.report))
    assert "12 of your images, held out" in lines
    assert "images given" in page
    assert "synthe" not in page
    assert "synthe" not in lines
    assert result.settings["images"] == "12 (given)"
    assert result.report.to_dict()["images_given"]
    made = trust_lines(dataclasses.replace(result.report, given=False))
    assert any("12 held-out synthetic images" in line for line in made)


def test_what_is_looked_at_needs_no_word(network):
    shape = (8, *network.contract.shape)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    result = dfq.quantize(network, images, scheme="w4a4", reconstruction="nearest")
    assert not any("only judge" in note for note in result.report.notes)
    assert result.report.images == 2
