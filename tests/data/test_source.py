"""`Source` as a sequence, and `decode` on damaged bytes."""

import io

import numpy as np
import PIL.Image
import pytest

from dfq_jax.data.source import Source, decode
from dfq_jax.errors import DataError, UnsafeInputError


def encoded(size: tuple[int, int] = (5, 4), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (1, 2, 3)).save(buffer, form)
    return buffer.getvalue()


def test_indexing_counts_from_both_ends():
    images = [PIL.Image.new("L", (1, 1), i) for i in range(3)]
    source = Source("three", ("a",), 3, lambda i: (images[i], 0))
    assert len(source) == 3
    assert source[-1][0] is images[2]
    assert [image for image, _ in source] == images
    with pytest.raises(IndexError, match="3 examples, asked for number 3"):
        source[3]


def test_decode_loads_pixels_and_remembers_the_file():
    image = decode(encoded(), "a/b.png")
    assert getattr(image, "filename", None) == "a/b.png"
    np.testing.assert_array_equal(np.asarray(image)[0, 0], [1, 2, 3])


@pytest.mark.parametrize("data", [b"", b"no image", encoded((64, 64), "JPEG")[:-200]])
def test_damaged_images_are_named(data):
    with pytest.raises(DataError, match=r"cannot decode a/b\.jpg .*Replace or remove"):
        decode(data, "a/b.jpg")


@pytest.mark.parametrize("size", [(12, 12), (30, 30)])
def test_too_many_pixels_are_refused(monkeypatch, size):
    """Pillow warns above its limit and raises above twice the limit; warnings are errors here."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnsafeInputError, match=r"refused to decode big\.png"):
        decode(encoded(size), "big.png")
