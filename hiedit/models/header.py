"""The header of a GGUF file, read from its first bytes without any package."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAGIC, VERSIONS = b"GGUF", (2, 3)
# By the type's number in the format: u8, i8, u16, i16, u32, i32, f32, bool, u64, i64, f64.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _ARRAY = 8, 9
_LONGEST = 1 << 28  # bytes of one text; more is damage


@dataclass(frozen=True)
class Header:
    """metadata: by key; of an array only its length. tensors: the shape of each, by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]

    @property
    def architecture(self) -> str:
        """``llama``, ``qwen2``, ...; empty where the file does not say."""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        """Weights in the file."""
        return sum(math.prod(shape) for shape in self.tensors.values())


def read_header(path: Path) -> Header:
    """The metadata and the table of tensors of a GGUF file.

    Raises:
        ValueError: if it is no GGUF file, of another version, or ends before its weights begin.
    """
    with path.open("rb") as file:
        magic = file.read(4)
        if magic != MAGIC:
            raise ValueError(f"{path}: no GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        try:
            version, tensors, values = _unpack(file, "IQQ")
            if version not in VERSIONS:
                raise ValueError(f"{path}: GGUF version {version}; version 2 or 3 is needed")
            metadata = {_text(file): _value(file, *_unpack(file, "I")) for _ in range(values)}
            shapes = dict(_tensor(file) for _ in range(tensors))
        except (EOFError, UnicodeDecodeError, KeyError) as error:
            what = "it ends in its header" if isinstance(error, EOFError) else "a damaged header"
            raise ValueError(f"{path}: {what} ({path.stat().st_size:,} bytes)") from None
    return Header(metadata, shapes)


def _unpack(file: BinaryIO, kind: str) -> tuple:
    size = struct.calcsize(f"<{kind}")
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return struct.unpack(f"<{kind}", data)


def _text(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    data = file.read(length) if length <= _LONGEST else b""
    if len(data) < length:
        raise EOFError
    return data.decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(file)
    if kind != _ARRAY:
        return _unpack(file, _NUMBERS[kind])[0]
    inner, length = _unpack(file, "IQ")
    if inner in _NUMBERS:
        file.seek(length * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
        return length
    for _ in range(length):
        if inner == _TEXT:  # not decoded: a vocabulary may hold pieces of characters
            file.seek(_unpack(file, "Q")[0], 1)
        else:
            _value(file, inner)
    return length


def _tensor(file: BinaryIO) -> tuple[str, tuple[int, ...]]:
    name = _text(file)
    (dimensions,) = _unpack(file, "I")
    shape = _unpack(file, f"{dimensions}Q")
    _unpack(file, "IQ")  # its type, its place
    return name, shape[::-1]
