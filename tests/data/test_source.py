"""`LabelledImages` as a sequence, and `decode` on damaged bytes."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest

from dfq_jax.data.source import LabelledImages, decode
from dfq_jax.errors import DataError, UnsafeInputError


def encoded(size: tuple[int, int] = (5, 4), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, (1, 2, 3)).save(buffer, form)
    return buffer.getvalue()


def test_indexing_counts_from_both_ends():
    images = [PIL.Image.new("L", (1, 1), i) for i in range(3)]
    source = LabelledImages("three", ("a",), 3, lambda i: (images[i], 0))
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


@pytest.mark.parametrize("form", ["EPS", "GIF", "PDF", "ICO", "TGA"])
def test_only_decoders_of_pictures_are_reached(monkeypatch, form):
    """Whatever a file is called: an EPS would start another program."""

    def forbidden(*_, **__):
        raise AssertionError("a program was started")

    data = encoded((32, 32), form)
    monkeypatch.setattr("subprocess.check_call", forbidden)
    monkeypatch.setattr("subprocess.Popen", forbidden)
    with pytest.raises(
        DataError, match=r"cannot decode a/b\.jpg .*BMP, JPEG, PNG, PPM, TIFF, WEBP"
    ):
        decode(data, "a/b.jpg")


@pytest.mark.parametrize("form", ["BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
def test_a_picture_may_be_called_otherwise(form):
    """Some of ImageNet's are PNGs called JPEG."""
    assert decode(encoded(form=form), "a/b.JPEG").size == (5, 4)


def test_large_pictures_are_not_decoded():
    """A header of 64 million pixels is as far as it goes."""
    header = bytearray(encoded((1, 1)))
    header[16:24] = struct.pack(">LL", 8193, 8192)
    header[29:33] = struct.pack(">L", zlib.crc32(header[12:29]))
    tracemalloc.start()
    with pytest.raises(UnsafeInputError, match=r"8192x8193 \(height x width\) is more than 67,1"):
        decode(bytes(header), "big.png")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
