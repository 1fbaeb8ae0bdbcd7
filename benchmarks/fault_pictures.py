"""Pictures and collections of pictures that would exhaust, stop or mislead who reads them."""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

Make = Callable[[Path, Any], Path]
"""(an empty folder, generator of random numbers) -> what to give as images."""
SUFFIXES = (".png", ".jpg", ".webp", ".bmp", ".tif", ".pgm")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def healthy(random: Any, form: str, mode: str = "RGB") -> bytes:
    """A picture of noise."""
    size = (int(random.integers(4, 40)), int(random.integers(4, 40)))
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(file, form)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *more: bytes) -> bytes:
    """A PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), *more, chunk(b"IDAT", rows), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def put(folder: Path, name: str, data: bytes) -> Path:
    """The folder with this file in it."""
    (folder / name).write_bytes(data)
    return folder


def bomb(folder: Path, random: Any) -> Path:
    """Few bytes that claim, and unpack to, gigabytes."""
    side, bits = int(random.integers(12_000, 60_000)), int(random.choice([1, 8, 16]))
    rows = zlib.compress(bytes(int(random.integers(1, 64)) << 20), 9)
    return put(folder, "a.png", png(side, side, bits, 0, rows))


def sixteen_bits(folder: Path, random: Any) -> Path:
    """As large as allowed, or nearly, with two bytes a value."""
    side = int(random.integers(6_000, 9_000))
    return put(folder, "a.png", png(side, side, 16, 2, zlib.compress(bytes(64 << 20), 9)))


def hidden(folder: Path, random: Any) -> Path:
    """A small picture with text or a profile that unpacks to far more."""
    kind = bytes(random.choice([b"zTXt", b"iCCP"]))
    data = b"note\0\0" + zlib.compress(bytes(256 << 20), 9)
    rows = zlib.compress(b"\0" + bytes(12), 9) * 1
    return put(folder, "a.png", png(4, 1, 8, 2, rows, chunk(kind, data)))


def disguised(folder: Path, random: Any) -> Path:
    """A format that no such suffix means, Ghostscript's among them."""
    form = str(random.choice(["EPS", "GIF", "ICO", "PCX", "TGA", "text", "nothing"]))
    data = {"EPS": POSTSCRIPT, "text": b"no picture at all", "nothing": b""}.get(form)
    if data is None:
        data = healthy(random, form)
    return put(folder, f"a{random.choice(SUFFIXES)}", data)


def damaged(folder: Path, random: Any) -> Path:
    """Flipped bits, cut short, or another picture's end."""
    suffix = str(random.choice(list(FORMATS)))
    data = bytearray(healthy(random, FORMATS[suffix]))
    for _ in range(int(random.integers(1, 6))):
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    cut = len(data) if random.random() < 0.5 else int(random.integers(len(data)))
    return put(folder, f"a{suffix}", bytes(data[:cut]))


def unusual(folder: Path, random: Any) -> Path:
    """Good pictures of rarer kinds."""
    mode, form = [
        ("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("I;16", "PNG"),
        ("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "WEBP"), ("F", "TIFF"), ("I", "TIFF"),
    ][int(random.integers(11))]  # fmt: skip
    suffix = next(s for s, f in FORMATS.items() if f == form)
    return put(folder, f"a{suffix}", healthy(random, form, mode))


def endless(folder: Path, random: Any) -> Path:
    """What is no regular file, though its name ends like a picture's."""
    name, what = folder / "a.png", int(random.integers(5))
    if what == 0:
        os.mkfifo(name)
    elif what == 4:
        name.mkdir()
    else:
        name.symlink_to(["/dev/zero", name.name, "/nowhere/at/all"][what - 1])
    return folder if random.random() < 0.7 else name


def lying_zip(folder: Path, random: Any) -> Path:
    """An archive with a member that lies about its size, escapes, or unpacks without end."""
    path, what = folder / "a.zip", int(random.integers(4))
    name = ["a.png", "../a.png", "/a.png", "a.png"][what]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(1 << 28) if what == 0 else healthy(random, "PNG"))
    data = bytearray(path.read_bytes())
    at = data.rfind(b"PK\1\2")
    if what == 0:
        data[at + 24 : at + 28] = struct.pack("<I", 1000)
    if what == 3:
        data[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
    path.write_bytes(bytes(data))
    return path


def lying_array(folder: Path, random: Any) -> Path:
    """Arrays whose header promises more than there is, of objects, or compressed zeros."""
    what, path = int(random.integers(4)), folder / "a.npz"
    if what == 0:
        np.savez_compressed(path, images=np.zeros((3_000, 64, 64, 3), np.uint8).repeat(8, 0))
    elif what == 1:
        np.savez(path, images=np.array([{}, []], object))
    else:
        shape = (2**40, 8, 8, 3) if what == 2 else (200_000, 8, 8, 3)
        head = io.BytesIO()
        told = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, told)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", head.getvalue() + bytes(100))
    return path


def many(folder: Path, random: Any) -> Path:
    """Thousands of names, nested deeply, few of them pictures."""
    place = folder
    for level in range(int(random.integers(5, 60))):
        place = place / f"level {level}"
    place.mkdir(parents=True)
    for number in range(int(random.integers(100, 2_000))):
        (folder / f"{number}.txt").write_bytes(b"")
    return put(place, "a.png", healthy(random, "PNG")) and folder


KINDS: dict[str, Make] = {
    "bomb": bomb,
    "16 bits": sixteen_bits,
    "hidden bomb": hidden,
    "disguised": disguised,
    "damaged": damaged,
    "unusual": unusual,
    "no file": endless,
    "archive": lying_zip,
    "array": lying_array,
    "many": many,
}


def read(path: Path) -> None:
    """What `--images` does with it."""
    from dfq_jax.api.given import image_set
    from dfq_jax.types import InputContract

    image_set(path, InputContract(8, 8))


def made(folder: Path, number: int, seed: int) -> tuple[str, Path]:
    """The kind of the picture of that number, and where it lies."""
    random = np.random.default_rng([seed, number])
    name, make = list(KINDS.items())[number % len(KINDS)]
    folder.mkdir(parents=True)
    return name, make(folder, random)


reading = partial(partial, read)
"""path -> a call that reads it."""
