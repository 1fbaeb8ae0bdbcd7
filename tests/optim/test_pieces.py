import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.optim.pieces import Piece, load_piece, save_piece

ARRAYS = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.int32(4), jnp.array([True, False]))}
ABOUT = [float("nan"), 0.1, ["told"], {"n": 1}]


@pytest.fixture
def path(tmp_path):
    save_piece(tmp_path / "piece.npz", Piece(ARRAYS, ABOUT))
    return tmp_path / "piece.npz"


def test_a_piece_comes_back(path):
    shapes = jax.eval_shape(lambda: ARRAYS)
    for like in (ARRAYS, shapes):
        found = load_piece(path, like)
        assert found is not None
        jax.tree.map(np.testing.assert_array_equal, found.arrays, ARRAYS)
        assert jax.tree.map(lambda v: v.dtype, found.arrays) == jax.tree.map(
            lambda v: v.dtype, ARRAYS
        )
        assert str(found.about) == str(ABOUT)


def test_equal_pieces_have_equal_bytes(path):
    before = path.read_bytes()
    save_piece(path, Piece(ARRAYS, ABOUT))
    assert path.read_bytes() == before


@pytest.mark.parametrize("at", [0, 30, 70, 100, 200, -1, -10, -60, -100, -200])
def test_damage_is_absence(path, at):
    """Wherever it is, a piece is whole or it is none."""
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)
    found = load_piece(path, ARRAYS)
    if found is not None:
        jax.tree.map(np.testing.assert_array_equal, found.arrays, ARRAYS)
        assert str(found.about) == str(ABOUT)
    path.write_bytes(data[: len(data) // 2])
    assert load_piece(path, ARRAYS) is None
    path.write_bytes(b"")
    assert load_piece(path, ARRAYS) is None
    path.unlink()
    assert load_piece(path, ARRAYS) is None
    path.mkdir()
    assert load_piece(path, ARRAYS) is None


@pytest.mark.parametrize(
    "like",
    [
        ARRAYS | {"a": jnp.zeros((3, 2))},
        ARRAYS | {"a": jnp.zeros((2, 3), jnp.int32)},
        ARRAYS | {"b": (jnp.int32(4),)},
        ARRAYS | {"c": jnp.zeros(())},
        (),
    ],
)
def test_another_piece_is_none(path, like):
    assert load_piece(path, like) is None
