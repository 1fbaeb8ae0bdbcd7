import io

import numpy as np
import PIL.Image
import pytest

from dfq_jax.examples import Examples
from dfq_jax.report.grid import grid_png, tiled
from dfq_jax.synthesis.sources.pixels import from_pixels
from dfq_jax.types import InputContract


def image_set(n, size, channels=3):
    contract = InputContract(size, size, mean=(0.4,) * channels, std=(0.2,) * channels)
    shade = np.arange(n, dtype=np.uint8)[:, None, None, None]
    pixels = np.broadcast_to(shade * 10, (n, size, size, channels))
    return Examples((from_pixels(pixels, contract),), (contract,))


def opened(data):
    with PIL.Image.open(io.BytesIO(data)) as picture:
        picture.load()
        return picture


def test_images_stand_in_reading_order_on_white():
    picture = opened(grid_png(image_set(6, 64)))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (3 * 66 - 2, 2 * 66 - 2))
    tile = lambda row, column: picture.getpixel((column * 66 + 32, row * 66 + 32))
    assert [tile(0, c) for c in range(3)] == [(0, 0, 0), (10, 10, 10), (20, 20, 20)]
    assert [tile(1, c) for c in range(3)] == [(30, 30, 30), (40, 40, 40), (50, 50, 50)]
    assert picture.getpixel((64, 10)) == (255, 255, 255)


def test_small_images_are_enlarged_and_large_ones_are_not():
    assert opened(grid_png(image_set(1, 20))).size == (60, 60)
    assert opened(grid_png(image_set(1, 100))).size == (100, 100)


def test_one_channel_is_grey():
    picture = opened(grid_png(image_set(2, 64, channels=1)))
    assert (picture.mode, picture.getpixel((70, 5))) == ("L", 10)


def test_of_many_images_evenly_spaced_ones_are_shown():
    picture = opened(grid_png(image_set(21, 64), most=3))
    shown = [picture.getpixel((column * 66, 0)) for column in range(2)]
    assert shown == [(0, 0, 0), (100, 100, 100)]
    assert picture.getpixel((0, 66)) == (200, 200, 200)


@pytest.mark.parametrize("n", range(1, 20))
def test_every_image_has_its_place(n):
    shades = np.arange(1, n + 1, dtype=np.uint8)
    sheet = tiled(np.broadcast_to(shades[:, None, None, None], (n, 64, 64, 1)))
    found = sheet[32::66, 32::66, 0].reshape(-1)
    np.testing.assert_array_equal(found[:n], shades)
    assert (found[n:] == 255).all()
    assert sheet.shape[1] >= sheet.shape[0]
