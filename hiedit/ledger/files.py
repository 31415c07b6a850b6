"""Files of tensors that are whole and on disk, or not there; every part has its checksum.

A file is safetensors: any tool can read it. Its tensors are laid out in *parts* (the factors of one
edit, one accumulator), each a contiguous range with a SHA-256 of its own, so that one part can be
read and checked without the rest, and moved to another file without being decoded. The header has
a checksum too; together they cover every byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hiedit.durable import sync
from hiedit.ledger.errors import DamagedError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TEMPORARY = ".tmp"
OURS = re.compile(r"[\w-]+-[0-9a-f]{12}\.safetensors(\.tmp)?")  # what a sweep may remove


@dataclass(frozen=True)
class Spec:
    """One tensor of a part: its name in the file, the name of its dtype (``DTYPES``), its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Spec:
        """Raises ValueError for a dtype that the ledger does not store."""
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}: store one of {list(NAMES)}")
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape))


@dataclass(frozen=True)
class Part:
    """Tensors that belong together; ``data`` yields their bytes in order, when they are due."""

    specs: Sequence[Spec]
    data: Callable[[], Iterable[bytes | bytearray | memoryview]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Part:
        specs = [Spec.of(name, tensor) for name, tensor in tensors.items()]
        return cls(specs, lambda: map(raw, tensors.values()))


@dataclass(frozen=True)
class Range:
    """The place of a part in its file: first byte, number of bytes, SHA-256 in hex."""

    start: int
    length: int
    sha256: str


@dataclass(frozen=True)
class Written:
    """A file that is on disk. header: SHA-256 of all before the first part."""

    file: str
    bytes: int
    header: str
    parts: tuple[Range, ...]


def raw(tensor: Tensor) -> memoryview:
    """The bytes of ``tensor``, row-major; of a contiguous tensor on the CPU without a copy."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def header_of(parts: Iterable[Sequence[Spec]]) -> bytes:
    """The safetensors header of parts in this order, with its length in front."""
    entries, end = {}, 0
    for spec in (spec for part in parts for spec in part):
        start, end = end, end + spec.bytes
        entries[spec.name] = {
            "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def write(folder: Path, stem: str, parts: Sequence[Part]) -> Written:
    """Writes a new file ``stem-<random>.safetensors`` to ``folder``; on return it is on disk.

    Nothing stays behind on an error, and a crash leaves at most a temporary. The random part keeps
    a file that a crash left without a record from ever meeting one with the same name.

    Raises:
        OSError: as the operating system says, for example of a full disk.
    """
    file = f"{stem}-{secrets.token_hex(6)}.safetensors"
    temporary = folder / (file + TEMPORARY)
    header = header_of(part.specs for part in parts)
    at, ranges = len(header), []
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(descriptor, header)
            for part in parts:
                digest, start = hashlib.sha256(), at
                for data in part.data():
                    digest.update(data)
                    _write_all(descriptor, data)
                    at += len(data)
                assert at - start == sum(spec.bytes for spec in part.specs), file
                ranges.append(Range(start, at - start, digest.hexdigest()))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, folder / file)
        sync(folder)
    except BaseException:
        remove(temporary, folder / file)
        raise
    return Written(file, at, hashlib.sha256(header).hexdigest(), tuple(ranges))


def _write_all(descriptor: int, data) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def read(path: Path, part: Range) -> bytearray:
    """The bytes of one part, after its checksum has been compared.

    Raises:
        DamagedError: if the file is missing or short, or the bytes are others.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(part.start)
            data = bytearray(part.length)
            left = memoryview(data)
            while left and (count := file.readinto(left)):
                left = left[count:]
    except OSError as error:
        raise DamagedError(path, error.strerror or str(error)) from error
    end = part.start + part.length
    if left:
        raise DamagedError(path, f"it ends at byte {end - len(left)}, before byte {end}")
    if hashlib.sha256(data).hexdigest() != part.sha256:
        raise DamagedError(path, f"bytes {part.start} to {end} are not those that were written")
    return data


def tensors(specs: Sequence[Spec], data: bytearray) -> dict[str, Tensor]:
    """The tensors of a part's bytes; they share its memory where their alignment allows."""
    found, at = {}, 0
    for spec in specs:
        dtype, count = DTYPES[spec.dtype], math.prod(spec.shape)
        if not count:
            found[spec.name] = torch.empty(spec.shape, dtype=dtype)
        elif at % dtype.itemsize:
            copy = data[at : at + spec.bytes]
            found[spec.name] = torch.frombuffer(copy, dtype=dtype).reshape(spec.shape)
        else:
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=at)
            found[spec.name] = flat.reshape(spec.shape)
        at += spec.bytes
    return found


def check_header(path: Path, size: int, header: str, specs: Iterable[Sequence[Spec]] | None = None):
    """Compares a file's size and header with the record of it, and the header with ``specs``.

    Raises:
        DamagedError: if they differ.
    """
    try:
        found = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(8)
            text = file.read(min(int.from_bytes(first, "little"), found))
    except OSError as error:
        raise DamagedError(path, error.strerror or str(error)) from error
    if found != size:
        raise DamagedError(path, f"it has {found} bytes, not {size}")
    if hashlib.sha256(first + text).hexdigest() != header:
        raise DamagedError(path, "its header is not the one that was written")
    if specs is not None and first + text != header_of(specs):
        raise DamagedError(path, "its header does not name the tensors of the record")


def remove(*paths: Path) -> None:
    """Deletes files that nothing refers to; one that cannot go now goes at a later sweep."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def strays(folder: Path, known: set[str]) -> list[Path]:
    """Files in ``folder`` that a writer made and no record refers to; foreign files are left."""
    names = (entry.name for entry in os.scandir(folder)) if folder.is_dir() else ()
    return [folder / name for name in names if name not in known and OURS.fullmatch(name)]
