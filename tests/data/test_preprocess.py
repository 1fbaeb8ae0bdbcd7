"""`preprocess` against torchvision on PIL images, and every colour mode it accepts."""

import importlib
import tracemalloc

import numpy as np
import PIL.Image
import pytest

from dfq_jax.data.preprocess import preprocess, to_colour
from dfq_jax.errors import DataError, UnsafeInputError, UsageError
from dfq_jax.types import InputContract


def plain(height: int, width: int, channels: int = 3, **options) -> InputContract:
    """A contract that only divides by 255."""
    return InputContract(height, width, (0.0,) * channels, (1.0,) * channels, **options)


@pytest.fixture(scope="session")
def transforms(torchvision):
    """torchvision's transforms on PIL images."""
    return importlib.import_module(f"{torchvision.__name__}.transforms.v2")


def photo(height: int, width: int, mode: str = "RGB") -> PIL.Image.Image:
    """Noise on a gradient: reacts to a shift of one pixel and to any change of filter."""
    channels = len(PIL.Image.new(mode, (1, 1)).getbands())
    rng = np.random.default_rng(height * 1000 + width)
    pixels = rng.integers(0, 128, (height, width, channels))
    pixels += np.linspace(0, 127, width, dtype=int)[None, :, None]
    return PIL.Image.fromarray(np.squeeze(pixels.astype(np.uint8)), mode=None).convert(mode)


def pixels_of(array: np.ndarray) -> np.ndarray:
    """Undoes the division."""
    return np.round(array * 255).astype(np.uint8)


@pytest.mark.torch
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("size", "resize", "crop"),
    [
        ((300, 401), 256, (224, 224)),
        ((401, 300), 256, (224, 224)),
        ((97, 33), 40, (30, 29)),  # margins 87 and 11: half pixels round to even; upsampled
        ((64, 64), 64, (33, 64)),
        ((50, 76), 51, (51, 51)),  # long side 77.52, truncated
    ],
)
def test_matches_torchvision_resize_and_centre_crop(transforms, size, resize, crop, filter_name):
    import torch

    contract = InputContract(*crop, resize=resize, interpolation=filter_name)
    image = photo(*size)
    reference = transforms.Compose(
        [
            transforms.Resize(resize, interpolation=transforms.InterpolationMode(filter_name)),
            transforms.CenterCrop(crop),
        ]
    )
    cropped = reference(image)
    raw = plain(*crop, resize=resize, interpolation=filter_name)
    np.testing.assert_array_equal(pixels_of(preprocess(image, raw)), np.asarray(cropped))

    normalise = transforms.Compose(
        [
            transforms.PILToTensor(),
            transforms.ToDtype(torch.float32, scale=True),
            transforms.Normalize(list(contract.mean), list(contract.std)),
        ]
    )
    expected = normalise(cropped).numpy().transpose(1, 2, 0)
    got = preprocess(image, contract)
    assert got.dtype == np.float32
    assert got.shape == contract.shape
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("size", [(20, 30), (64, 48), (200, 31), (32, 33)])
def test_without_resize_the_whole_image_is_resized(transforms, size):
    """Smaller, larger and nearly equal images alike; nothing is cropped away."""
    image = photo(*size)
    expected = transforms.Resize((32, 32))(image)
    got = preprocess(image, plain(32, 32))
    np.testing.assert_array_equal(pixels_of(got), np.asarray(expected))


@pytest.mark.parametrize("resize", [None, 32])
def test_an_image_of_the_right_size_keeps_its_pixels(resize):
    image = photo(32, 32)
    got = preprocess(image, plain(32, 32, resize=resize, interpolation="bicubic"))
    np.testing.assert_array_equal(pixels_of(got), np.asarray(image))


def test_a_short_side_of_the_right_length_is_only_cropped():
    image = photo(32, 45)
    got = preprocess(image, plain(32, 32, resize=32))
    left = round((45 - 32) / 2)
    np.testing.assert_array_equal(pixels_of(got), np.asarray(image)[:, left : left + 32])


def test_normalisation_is_per_channel():
    contract = InputContract(4, 4, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    image = photo(4, 4)
    expected = (np.asarray(image) / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]
    np.testing.assert_allclose(preprocess(image, contract), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "LA", "YCbCr", "HSV", "1"])
def test_colour_modes_become_rgb_as_pillow_converts_them(mode):
    image = photo(8, 8).convert(mode) if mode != "LA" else photo(8, 8, "L").convert("LA")
    got = preprocess(image, plain(8, 8))
    np.testing.assert_array_equal(pixels_of(got), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))])
def test_palette_images_keep_their_colours(transparency):
    image = photo(8, 8).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    if transparency is not None:
        image.info["transparency"] = transparency
    np.testing.assert_array_equal(pixels_of(preprocess(image, plain(8, 8))), expected)


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_sixteen_bit_grey_scales_to_the_full_range(mode):
    values = np.array([[128, 129], [65406, 65535]])
    image = PIL.Image.fromarray(values.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    got = preprocess(image, plain(2, 2, 1))
    assert got.shape == (2, 2, 1)
    np.testing.assert_array_equal(pixels_of(got)[..., 0], [[0, 1], [254, 255]])
    assert preprocess(image, plain(2, 2)).shape == (2, 2, 3)


def test_one_channel_contracts_read_luma():
    image = photo(8, 8)
    got = preprocess(image, plain(8, 8, 1))
    np.testing.assert_array_equal(pixels_of(got)[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize(
    ("image", "contract", "error", "message"),
    [
        (PIL.Image.new("F", (4, 4)), InputContract(4, 4), DataError, "float pixels"),
        (PIL.Image.new("La", (4, 4)), InputContract(4, 4), DataError, "mode La into RGB"),
        (PIL.Image.new("I", (4, 4), 70000), InputContract(4, 4), DataError, "0..65535"),
        (
            PIL.Image.new("RGB", (4, 4)),
            plain(4, 4, 4),
            UsageError,
            "4 channels",
        ),
        (
            PIL.Image.new("RGB", (40, 40)),
            InputContract(32, 32, resize=24),
            UsageError,
            "at least 32",
        ),
        (
            PIL.Image.new("L", (200_000, 1)),
            InputContract(32, 32, resize=64),
            UnsafeInputError,
            "refused to resize",
        ),
    ],
)
def test_errors_name_the_remedy(image, contract, error, message):
    with pytest.raises(error, match=message):
        preprocess(image, contract)


def test_sixteen_bits_take_little_more_memory_than_the_picture():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 65536, (3000, 1000), np.uint16)
    image = PIL.Image.fromarray(values)
    tracemalloc.start()
    found = to_colour(image, 1)
    assert tracemalloc.get_traced_memory()[1] < 4 * values.nbytes
    tracemalloc.stop()
    np.testing.assert_array_equal(found, np.rint(values / 257))
