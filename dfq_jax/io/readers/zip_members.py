"""Zip archives from strangers: every member is bounded, checked and served from memory."""

import io
import re
import struct
import zipfile
import zlib

from dfq_jax.errors import CheckpointError, UnsafeInputError
from dfq_jax.io.readers.pickle_policy import show

MAX_MEMBERS = 100_000
MAX_EXTRA = 128  # bytes that the directory adds to one member; PyTorch needs 28
MOST_EXTRAS = 16  # members that may have more: reading that takes quadratic time
MAX_GROWTH = 8  # unpacked bytes per byte of file; PyTorch stores, it does not compress
GROWTH_SLACK = 1 << 20
ENCRYPTED_OR_PATCHED = 0x1 | 0x20 | 0x40 | 0x2000
UNSAFE_NAME = re.compile(r"^[/\\~]|^[A-Za-z]:|(^|[/\\])\.\.($|[/\\])|[\x00-\x1f\x7f]")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")


def memory_budget(file_bytes: int) -> int:
    """Bytes that reading a file of this size may produce before it counts as a bomb."""
    return MAX_GROWTH * file_bytes + GROWTH_SLACK


class ZipMembers:
    """The members of one archive.

    Attributes:
      where: what messages call the archive.
      names: all member names, in archive order.
      file_bytes: size of the archive.
    """

    def __init__(self, data: bytes, where: str):
        """Checks the directory of the archive in `data`; unpacks nothing.

        Args:
          data: the whole file.
          where: what messages call it.

        Raises:
          CheckpointError: if the archive is damaged, cut short or encrypted.
          UnsafeInputError: if it has too many members, repeated names, names that leave a folder,
            or would unpack to far more than the file holds.
        """
        self.where, self._data, self.file_bytes = where, data, len(data)
        infos = _directory(data, where)
        self._infos = {info.filename: info for info in infos}
        # PyTorch can be told to write no checksums; then every one of them is zero.
        self._checksums = any(info.CRC for info in infos)
        self._read: dict[str, memoryview] = {}
        self.names = tuple(self._infos)
        if len(self.names) < len(infos):
            raise UnsafeInputError(f"{where} holds several members of the same name; refused.")
        for info in infos:
            self._check(info)
        total = sum(info.file_size for info in infos)
        if total > memory_budget(len(data)):
            raise UnsafeInputError(
                f"{where} has {len(data)} bytes and claims to unpack to {total}; refused as a zip "
                "bomb. PyTorch does not compress: unpack it yourself and save it again."
            )

    def __contains__(self, name: object) -> bool:
        """Whether the archive has a member of this name."""
        return name in self._infos

    def read(self, name: str) -> memoryview:
        """The unpacked bytes of one member, after its checksum, if any, was verified.

        Args:
          name: one of `names`.

        Returns:
          The bytes; stored members are not copied.

        Raises:
          CheckpointError: if the member is missing or damaged.
          UnsafeInputError: if it unpacks to more than it claims.
        """
        if name not in self._infos:
            raise CheckpointError(f"{self.where} has no member {show(name)}; it is incomplete.")
        if name not in self._read:
            self._read[name] = self._unpack(self._infos[name])
        return self._read[name]

    def _check(self, info: zipfile.ZipInfo) -> None:
        name = show(info.orig_filename)
        if UNSAFE_NAME.search(info.orig_filename):
            raise UnsafeInputError(
                f"{self.where} holds a member {name!r} that would land outside its folder; refused."
            )
        if info.flag_bits & ENCRYPTED_OR_PATCHED:
            raise CheckpointError(f"{self.where}: member {name} is encrypted; decrypt the file.")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise CheckpointError(
                f"{self.where}: member {name} uses compression method {info.compress_type}; "
                "repack the file without compression."
            )
        stored = info.compress_type == zipfile.ZIP_STORED
        if stored and info.file_size != info.compress_size:
            raise self._damaged(info, "two different sizes for uncompressed data")

    def _damaged(self, info: zipfile.ZipInfo, detail: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} is damaged: member {show(info.filename)} at byte {info.header_offset}: "
            f"{detail}. Download or save the file again."
        )

    def _unpack(self, info: zipfile.ZipInfo) -> memoryview:
        packed = self._packed(info)
        if info.compress_type == zipfile.ZIP_DEFLATED:
            content = self._inflate(info, packed)
        else:
            content = packed
        if len(content) != info.file_size:
            raise self._damaged(info, f"{len(content)} bytes instead of {info.file_size}")
        if self._checksums and zlib.crc32(content) != info.CRC:
            raise self._damaged(info, "wrong checksum")
        return content

    def _packed(self, info: zipfile.ZipInfo) -> memoryview:
        start = info.header_offset
        header = self._data[start : start + LOCAL_HEADER.size] if start >= 0 else b""
        if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise self._damaged(info, "no local header")
        name_size, extra_size = LOCAL_HEADER.unpack(header)[-2:]
        start += LOCAL_HEADER.size
        if self._data[start : start + name_size] != info.orig_filename.encode(
            "utf-8" if info.flag_bits & 0x800 else "cp437"
        ):
            raise self._damaged(info, "its local header gives another name")
        start += name_size + extra_size
        if start + info.compress_size > len(self._data):
            raise self._damaged(info, f"{info.compress_size} bytes reach beyond the end of file")
        return memoryview(self._data)[start : start + info.compress_size]

    def _inflate(self, info: zipfile.ZipInfo, packed: memoryview) -> memoryview:
        try:
            content = zlib.decompressobj(-15).decompress(packed, info.file_size + 1)
        except zlib.error as error:
            raise self._damaged(info, show(error)) from error
        if len(content) > info.file_size:
            raise UnsafeInputError(
                f"{self.where}: member {show(info.filename)} unpacks to more than the "
                f"{info.file_size} bytes it claims; refused as a zip bomb."
            )
        return memoryview(content)


def _directory(data: bytes, where: str) -> list[zipfile.ZipInfo]:
    # Every directory entry has this signature, so the count bounds the work before it starts.
    if data.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise UnsafeInputError(f"{where} holds more than {MAX_MEMBERS:,} members; refused.")
    longer = (
        int.from_bytes(data[found.start() + 30 : found.start() + 32], "little") > MAX_EXTRA
        for found in re.finditer(b"PK\x01\x02", data)
    )
    if sum(longer) > MOST_EXTRAS:
        raise UnsafeInputError(
            f"{where} is a zip archive with extra fields of over {MAX_EXTRA} bytes; refused. "
            "Repack the file."
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return archive.infolist()
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        ArithmeticError,
        LookupError,
        NotImplementedError,
        OSError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(
            f"{where} starts as a zip archive but has no readable directory at its end, byte "
            f"{len(data)} ({show(error)}): cut short or damaged. Download or save it again."
        ) from error
