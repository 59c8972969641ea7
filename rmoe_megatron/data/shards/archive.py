"""What lies where in an uncompressed tar archive: all of a shard once, then one sample from the bytes of its own members.

The members of a sample lie side by side in most shards. Where they do not (``tar cf x.tar *.jpg *.txt``), a sample has several pieces.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from rmoe_megatron.errors import UserError

_BLOCK = tarfile.BLOCKSIZE
# How compressed files begin, whatever they are called.
COMPRESSED = {
    b"\x1f\x8b": "it is compressed with gzip; unpack it first (`gunzip`)",
    b"BZh": "it is compressed with bzip2; unpack it first (`bunzip2`)",
    b"\xfd7zXZ": "it is compressed with xz; unpack it first (`unxz`)",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; unpack it first (`unzstd`)",
    b"PK\3\4": "it is a ZIP archive; unpack it first (`unzip`)",
}
MAX_ZEROS = 1 << 30  # that are read to see whether anything comes behind them


@dataclass
class Piece:
    """Members with one key that lie side by side: a whole sample, or a part of one.

    Attributes:
        key: the members' path up to the first dot of the file's name.
        offset: where the first header begins, in bytes.
        size: from there to the end of the last member's content.
        members: extension -> (offset, size) of the content in the archive.
    """

    key: str
    offset: int
    size: int = 0
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def next_header(self) -> int:
        """Return the offset behind the last member's content and what fills its block."""
        return self.offset + -(-self.size // _BLOCK) * _BLOCK


def base_plus_ext(path: str) -> tuple[str | None, str]:
    """Split a member's path into the key of its sample and its extension, as WebDataset does; None is no sample's."""
    match = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", path)
    return (match[1], match[2]) if match else (None, "")


def is_litter(path: str) -> bool:
    """Whether a Mac has put a member beside those that were meant: its copies of attributes (``._a.jpg``), its folders' settings."""
    folder, _, name = path.rpartition("/")
    return name.startswith("._") or name == ".DS_Store" or "__MACOSX" in folder.split("/")


def scan(file: BinaryIO, damage: list[str]) -> Iterator[Piece]:
    """Find the pieces of a shard's samples from its headers, one after the other.

    Of a damaged shard everything that can be found is yielded. Damage is what a sound archive cannot have: anything but
    members and the zeros at the end. Between two pieces the file may be read elsewhere. What a Mac has put between the members of
    a sample is passed over. A piece has no extension twice: the second member that has it begins another piece.

    Args:
        damage: takes up where the shard is damaged.

    Raises:
        OSError: it cannot be read.
    """
    piece: Piece | None = None
    litter_end = -1  # of what lies behind the piece's last member and is none of it
    for member in _members(file, damage):
        key, extension = base_plus_ext(member.name)
        if member.isfile() and is_litter(member.name):
            if piece is not None and member.offset in (piece.next_header, litter_end):
                litter_end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            continue
        if not member.isfile() or key is None:
            continue
        if (
            piece is None
            or piece.key != key
            or extension.lower() in piece.members
            or member.offset not in (piece.next_header, litter_end)
        ):
            if piece is not None:
                yield piece
            piece = Piece(key, member.offset)
        piece.members[extension.lower()] = (member.offset_data, member.size)
        piece.size = member.offset_data + member.size - piece.offset
    if piece is not None:
        yield piece


def parse(content: memoryview, offset: int) -> Piece:
    """Return the piece whose members' headers and contents are ``content``, read at ``offset``.

    Raises:
        ValueError: these bytes are no members of one sample.
    """
    piece = Piece("", offset, len(content))
    position = 0
    while position + _BLOCK <= len(content):
        header = bytes(content[position : position + _BLOCK])
        if header[156:157] not in (b"0", b"\0") or header[124] & 0x80:
            return _parse_extended(content, offset)
        name = header[:100].rstrip(b"\0")
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].rstrip(b"\0")):
            name = prefix + b"/" + name
        size = int(header[124:136].strip(b" \0") or b"0", 8)
        _add(piece, name.decode("utf-8", "surrogateescape"), offset + position + _BLOCK, size)
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    return piece


def _parse_extended(content: memoryview, offset: int) -> Piece:
    """Do as :func:`parse` for names or sizes that take headers of their own."""
    piece = Piece("", offset, len(content))
    try:
        padded = io.BytesIO(bytes(content) + bytes(-len(content) % _BLOCK))
        with tarfile.open(fileobj=padded, mode="r:") as tar:
            for member in tar:
                if member.isfile():
                    _add(piece, member.name, offset + member.offset_data, member.size)
    except Exception as error:  # on damaged headers tarfile raises nearly anything
        raise ValueError(f"damaged headers: {error}") from error
    return piece


def _add(piece: Piece, name: str, offset: int, size: int) -> None:
    if is_litter(name):
        return
    key, extension = base_plus_ext(name)
    if key is None or (piece.members and key != piece.key):
        raise ValueError(f"the member {name!r} is not of this sample")
    if offset + size > piece.offset + piece.size:
        raise ValueError(f"the member {name!r} is cut off")
    piece.key = key
    piece.members[extension.lower()] = (offset, size)


def _members(file: BinaryIO, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """Yield the members whose headers pass their checksum; what else there is, is told to ``damage``."""
    end = 0  # of the members so far
    try:
        beginning = file.read(6)
        if (
            kind := next((said for mark, said in COMPRESSED.items() if beginning.startswith(mark)), None)
        ) is not None:
            damage.append(kind)
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(_behind_zeros(file, 0, size))
        # Without ignore_zeros tarfile takes a damaged header, or zeros in the middle, for the end of the archive.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps them all
                if member.offset != end:
                    damage.append(f"no members in bytes {end} to {member.offset}")
                if not 0 <= member.size <= size - member.offset_data:
                    raise tarfile.ReadError(f"member {member.name} is cut off")
                end = tar.offset
                yield member
                tar.offset = _behind_zeros(file, end, size)  # tarfile would read them block by block
            if not _is_end_of_archive(file, end, size):
                damage.append(f"no header and no end of the archive at byte {end}")
    except (OSError, UserError):
        raise
    except Exception as error:  # on damaged headers tarfile raises nearly anything
        damage.append(f"{error} at byte {end}")


def _behind_zeros(file: BinaryIO, start: int, size: int) -> int:
    """Return the offset of the first block from ``start`` on that is not of zeros, or the size of the file.

    Holes, of which a file of any size may consist, are not read.

    Raises:
        ValueError: there are more zeros than anybody puts into an archive.
    """
    offset = start
    file.seek(offset)
    while content := file.read(1 << 20):
        if rest := content.lstrip(b"\0"):
            return offset + (len(content) - len(rest)) // _BLOCK * _BLOCK
        offset += len(content)
        if offset - start > MAX_ZEROS:
            raise ValueError(f"more than {MAX_ZEROS} zeros from byte {start} on, not read further")
        offset = file.seek(_next_data(file, offset, size))
    return size


def _next_data(file: BinaryIO, offset: int, size: int) -> int:
    """Return the offset from which on there is something in a local file, which is behind a hole if there is one."""
    try:
        descriptor = file.fileno()
    except io.UnsupportedOperation:  # no file of this machine
        return offset
    place = os.lseek(descriptor, 0, os.SEEK_CUR)  # that ``file`` counts on
    try:
        return os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError:  # nothing but a hole
        return size
    finally:
        os.lseek(descriptor, place, os.SEEK_SET)


def _is_end_of_archive(file: BinaryIO, offset: int, size: int) -> bool:
    """Whether from ``offset`` on there are zeros only, and at least one block of them."""
    return size - offset >= _BLOCK and _behind_zeros(file, offset, size) == size
