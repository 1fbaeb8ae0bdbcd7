import numpy as np
import pytest

from dfq_jax.numerics.packing import pack, packed_bytes, planes_of, unpack

COUNTS = (0, 1, 7, 8, 9, 250, 4096)


@pytest.mark.parametrize("bits", range(1, 8))
@pytest.mark.parametrize("count", COUNTS)
def test_codes_come_back_and_take_their_bits(bits, count):
    codes = np.random.default_rng(bits).integers(0, 2**bits, count).astype(np.uint8)
    planes = pack(codes, bits)
    np.testing.assert_array_equal(unpack(planes, bits, count), codes)
    assert sum(p.size for p in planes) == packed_bytes(count, bits)
    assert 0 <= packed_bytes(count, bits) - count * bits / 8 <= bits


def test_planes_cover_the_bits_of_a_code_once():
    for bits in range(1, 8):
        mask = sum((1 << width) - 1 << below for width, below in planes_of(bits))
        assert mask == 2**bits - 1
        assert sum(width for width, _ in planes_of(bits)) == bits


def test_four_bits_lie_as_onnx_packs_them():
    np.testing.assert_array_equal(pack(np.array([1, 15, 7], np.uint8), 4)[0], [0xF1, 0x07])


@pytest.mark.parametrize("bits", [0, 8])
def test_whole_bytes_are_not_packed(bits):
    with pytest.raises(ValueError, match="1 to 7 bits"):
        planes_of(bits)


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="at most 3, got 4"):
        pack(np.array([4], np.uint8), 2)
