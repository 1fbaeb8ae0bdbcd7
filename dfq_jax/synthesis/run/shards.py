"""A set of images as a folder: one `.npz` per batch and a manifest, which several processes share.

Every file depends only on what the images depend on, so a set has the same bytes whoever made it,
in however many attempts. The manifest comes last; without it a set is not finished.
"""

import dataclasses
import json
import operator
import struct
import zipfile
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import jax
import numpy as np
from jaxtyping import Float, Float32

from dfq_jax.base.files import (
    NOT_AN_NPZ,
    read_regular,
    remove_left,
    sha256_of,
    write_atomically,
)
from dfq_jax.errors import DataError, UsageError
from dfq_jax.examples import Examples, evidence_in
from dfq_jax.optim.state import StateStore, refuse_other_run
from dfq_jax.types import InputContract
from dfq_jax.values import fingerprint

MANIFEST = "manifest.json"
FORMAT = "dfq_jax images"
LARGEST_MANIFEST = 64 << 20
VERSION = 1
Pixels = Float32[np.ndarray, "n h w c"]


REMEDY = (
    "It was damaged or replaced: delete it, then run the command that made the set again; it makes "
    "what is missing."
)


@dataclasses.dataclass(frozen=True)
class ShardSet:
    """A set that is being made.

    Attributes:
      folder: where.
      n: images in all.
      size: images of a shard, the last one excepted.
      contract: they satisfy.
      provenance: what they depend on: plain data, without times.
      recipe: how they are made (`values.described`), if anybody says.
    """

    folder: Path
    n: int
    size: int
    contract: InputContract
    provenance: Mapping[str, Any]
    recipe: Any = None

    @property
    def count(self) -> int:
        """How many shards."""
        return -(-self.n // self.size)

    @property
    def facts(self) -> dict[str, Any]:
        """What a saved state depends on."""
        return {**self.provenance, "n": self.n, "recipe": self.recipe}

    def path(self, index: int) -> Path:
        """Where a shard is."""
        return self.folder / f"shard-{index:05d}-of-{self.count:05d}.npz"

    def rows(self, index: int) -> int:
        """Images of a shard."""
        return min(self.size, self.n - index * self.size)


def begin_set(shards: ShardSet, state: Path) -> bool:
    """Creates the folders of a set and its state, or checks that what they hold belongs to it.

    What killed processes left of files on their way is removed.

    Args:
      shards: the set.
      state: folder of a `StateStore`, which every process creates before its first shard.

    Returns:
      Whether the set is finished.

    Raises:
      UsageError: if a folder holds something of another run.
    """
    shards.folder.mkdir(parents=True, exist_ok=True)
    finished = (shards.folder / MANIFEST).exists()
    if finished:
        wanted, found = description(shards), manifest_of(shards.folder).about
        either = {"recipe": wanted.get("recipe")}  # older manifests do not say
        refuse_other_run(shards.folder, identity(either | found), identity(either | wanted))
    else:
        strange = sorted(shards.folder.glob("shard-*.npz"))  # looked for before the state is
        if strange and not (state / "fingerprint.json").exists():
            raise UsageError(
                f"{shards.folder} holds {len(strange)} shards of an unknown run, e.g. "
                f"{strange[0].name}; choose an empty folder."
            )
    StateStore(state, shards.facts)
    remove_left(shards.folder)
    return finished and all(shards.path(index).exists() for index in range(shards.count))


def write_shard(shards: ShardSet, index: int, images: Float[Any, "n h w c"]) -> None:
    """Puts a shard in place, whole; equal images give equal bytes.

    Args:
      shards: the set.
      index: of the shard.
      images: normalised; those beyond its rows are left out.
    """
    pixels = np.asarray(images, np.float32)[: shards.rows(index)]
    write = lambda file: np.savez(file, allow_pickle=False, images=pixels)
    write_atomically(shards.path(index), write)


def is_whole(shards: ShardSet, index: int) -> bool:
    """Whether a shard is there, and nothing of it is damaged."""
    path = shards.path(index)
    try:
        mapped(path, (shards.rows(index), *shards.contract.shape))
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (*NOT_AN_NPZ, DataError, OSError):
        return False


def finish_set(shards: ShardSet) -> bool:
    """Writes the manifest if all shards are there.

    Whichever processes notice that the set is complete write the same bytes.

    Returns:
      Whether it is.

    Raises:
      DataError: if a shard does not hold what it should.
    """
    paths = [shards.path(index) for index in range(shards.count)]
    if not all(path.exists() for path in paths):
        return False
    entries = [
        {"file": path.name, "images": shards.rows(i), **sealed(path, shards.rows(i), shards)}
        for i, path in enumerate(paths)
    ]
    text = json.dumps({**description(shards), "shards": entries}, indent=1, sort_keys=True)
    manifest = shards.folder / MANIFEST
    write_atomically(manifest, f"{text}\n".encode())
    return True


def sealed(path: Path, rows: int, shards: ShardSet) -> dict[str, Any]:
    """Size and hash of a shard that holds as many images as it should."""
    mapped(path, (rows, *shards.contract.shape))
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def description(shards: ShardSet) -> dict[str, Any]:
    """What a manifest says but for its shards."""
    about = {"format": FORMAT, "version": VERSION, "n": shards.n, "size": shards.size}
    about |= {"contract": shards.contract.to_dict(), "provenance": shards.provenance}
    if shards.recipe is not None:
        about["recipe"] = fingerprint(shards.recipe)
    return json.loads(json.dumps(about))


def identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What two manifests must agree on to be of one set."""
    own = {k: v for k, v in manifest.items() if k not in ("shards", "provenance")}
    return {**manifest["provenance"], **own}


class Shard(NamedTuple):
    """What a manifest says about a shard."""

    file: str
    images: int
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """A manifest as it was read.

    Attributes:
      about: all of it but the shards.
      contract: the images satisfy.
      shards: in order.
    """

    about: dict[str, Any]
    contract: InputContract
    shards: tuple[Shard, ...]


def manifest_of(folder: Path) -> Manifest:
    """The manifest of a finished set.

    Raises:
      DataError: if there is none, or it is none of ours.
    """
    path = folder / MANIFEST
    try:
        about = json.loads(read_regular(path, LARGEST_MANIFEST))
        shards = tuple(Shard(**entry) for entry in about.pop("shards"))
        mine = (about["format"], about["version"]) == (FORMAT, VERSION)
        sound = all(Path(s.file).name == s.file and s.images > 0 for s in shards)
        sound &= about["n"] == sum(s.images for s in shards) > 0
        sound &= isinstance(about.get("provenance"), dict)
        contract = contract_from(about["contract"])
    except FileNotFoundError:
        raise DataError(
            f"{folder} has no {MANIFEST}: it is not a finished set of images. If one was being "
            "made there, run the same command again; it makes what is missing."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error!r}); make the images anew.") from None
    if not mine or not sound:
        raise DataError(
            f"{path} is not the manifest of an image set of version {VERSION}; it was written by "
            "another program or version. Read it with that, or make the images anew."
        )
    return Manifest(about, contract, shards)


def contract_from(fields: Mapping[str, Any]) -> InputContract:
    """The input contract of a manifest, whose lists are tuples again."""
    whole: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return InputContract(**whole)


def mapped(path: Path, shape: tuple[int, ...]) -> Pixels:
    """The images of a shard, read from disk page by page as they are looked at.

    Args:
      path: an `.npz` file that is not compressed, as `write_shard` makes them.
      shape: it must have.

    Raises:
      DataError: if it does not hold such images.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo("images.npy")
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            file.seek(sum(struct.unpack("<HH", file.read(4))), 1)  # its name, and what follows it
            np.lib.format.read_magic(file)
            found, fortran, kind = np.lib.format.read_array_header_1_0(file)
            offset = file.tell()
        fits = (found, fortran, kind, info.compress_type) == (shape, False, np.float32, 0)
        if fits:
            return np.memmap(path, np.float32, "r", offset, shape)
    except (*NOT_AN_NPZ, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}). {REMEDY}") from None
    raise DataError(f"{path} holds {kind} {found}, expected float32 {shape}. {REMEDY}")


class ImageShards:
    """The images of a finished set, addressable by index, in an order that never changes.

    A shard is checked against the manifest when it is first looked at, and read page by page, so
    a set may be larger than the memory. What is needed to read it is pickled, not what was read.

    Attributes:
      folder: of the set.
      contract: the images satisfy.
      provenance: plain data.
      shards: what the manifest says about each.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the manifest.

        Raises:
          DataError: if the set is not finished, or a shard is missing or of another size.
        """
        self.folder = Path(folder)
        manifest = manifest_of(self.folder)
        self.contract = manifest.contract
        self.provenance: dict[str, Any] = manifest.about["provenance"]
        self.shards = manifest.shards
        self._ends = list(accumulate(shard.images for shard in self.shards))
        self._opened: dict[int, Pixels] = {}
        for shard in self.shards:
            check_size(self.folder / shard.file, shard.bytes)

    def __len__(self) -> int:
        """Number of images."""
        return self._ends[-1]

    def __getitem__(self, index: SupportsIndex) -> dict[str, Float32[np.ndarray, "h w c"]]:
        """`{"image": normalised image}`; negative indices count from the end.

        Raises:
          IndexError: if there is no such image.
          DataError: if its shard is damaged.
        """
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.folder} has {len(self)} images, asked for number {number}.")
        number %= len(self)
        shard = bisect_right(self._ends, number)
        return {"image": np.array(self.shard(shard)[number - self._ends[shard]])}

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as its folder, so that processes read on their own."""
        return ImageShards, (self.folder,)

    def __repr__(self) -> str:
        """The call that makes it."""
        return f"ImageShards({str(self.folder)!r})"

    def shard(self, number: int) -> Pixels:
        """All images of a shard.

        Raises:
          DataError: if it is not what the manifest says.
        """
        if number not in self._opened:
            entry = self.shards[number]
            path = self.folder / entry.file
            if (found := sha256_of(path)) != entry.sha256:
                raise DataError(f"{path} has the SHA-256 {found}, not that of the set. {REMEDY}")
            self._opened[number] = mapped(path, (entry.images, *self.contract.shape))
        return self._opened[number]


def check_size(path: Path, size: int) -> None:
    """Refuses a shard that is missing or of another size.

    Raises:
      DataError: naming it.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing. Run the command that made the set again.")
    if (found := path.stat().st_size) != size:
        raise DataError(f"{path} has {found} bytes, not {size}. {REMEDY}")


def load_shards(folder: str | Path) -> Examples:
    """All images of a finished set at once.

    Raises:
      DataError: if it is not finished, or damaged.
    """
    source = ImageShards(folder)
    images = np.concatenate([source.shard(number) for number in range(len(source.shards))])
    made = source.provenance
    return Examples((jax.device_put(images),), (source.contract,), made, evidence_in(made))
