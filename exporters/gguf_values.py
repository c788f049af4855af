"""Metadata values of a GGUF file: one typed value, its bytes, and a reader that trusts nothing.

Format: ggml's ``docs/gguf.md``, version 3 (little-endian; version 2 differs in nothing that is read
here). The limits hold for input of any origin, so that a hostile header costs neither memory nor
time: what it says it contains must fit into the bytes that are there before anything is allocated.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, BinaryIO

from gguf import GGUFValueType

from edgekit.errors import RefusedError

MAX_STRING_BYTES = 64 * 1024**2  # a chat template or a licence; llama.cpp takes up to 1 GiB
MAX_ITEM_BYTES = 64 * 1024  # a string inside an array: a token, a merge, a tag
MAX_KEY_BYTES = 65535  # docs/gguf.md
MAX_ITEMS = 4 * 1024**2  # in all arrays of one file; a vocabulary of 262 144 tokens needs 1.3 M

_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Value:
    """One metadata value.

    Attributes:
        type: GGUF's type of the value.
        value: ``int``, ``float``, ``bool``, ``str``, or for an array a list of one of them.
        item_type: Type of the items of an array, else ``None``.
    """

    type: GGUFValueType
    value: Any
    item_type: GGUFValueType | None = None


def u32(value: int) -> Value:
    """Make an unsigned 32-bit value, the type that llama.cpp reads most counts as."""
    return Value(GGUFValueType.UINT32, value)


def i32(value: int) -> Value:
    """Make a signed 32-bit value."""
    return Value(GGUFValueType.INT32, value)


def u64(value: int) -> Value:
    """Make an unsigned 64-bit value."""
    return Value(GGUFValueType.UINT64, value)


def f32(value: float) -> Value:
    """Make a 32-bit float value; it is rounded when it is written."""
    return Value(GGUFValueType.FLOAT32, value)


def boolean(value: bool) -> Value:
    """Make a boolean value."""
    return Value(GGUFValueType.BOOL, value)


def string(value: str) -> Value:
    """Make a string value, UTF-8 in the file."""
    return Value(GGUFValueType.STRING, value)


def array(item_type: GGUFValueType, values: Iterable[Any]) -> Value:
    """Make an array whose items all have ``item_type``, a scalar or a string."""
    return Value(GGUFValueType.ARRAY, list(values), item_type)


def shown(text: str) -> str:
    """Quote ``text`` for a message: control characters escaped, at most 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def pack_string(text: str) -> bytes:
    """Return the length, uint64, and UTF-8 bytes of ``text``."""
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RefusedError(
            f"string {shown(text)} holds a lone surrogate, GGUF strings are UTF-8; "
            f"mend it in the source"
        ) from error
    return _LENGTH.pack(len(encoded)) + encoded


def pack_value(key: str, value: Value) -> bytes:
    """Return the bytes of a value with its type in front.

    Raises:
        RefusedError: The value does not fit its type.
    """
    try:
        return struct.pack("<I", value.type) + _pack(value.type, value.value, value.item_type)
    except (struct.error, OverflowError, TypeError, AttributeError, KeyError) as error:
        raise RefusedError(
            f"metadata {shown(key)} holds {shown(repr(value.value))}, "
            f"which is no {value.type.name} of GGUF: {error}"
        ) from error


def _pack(kind: GGUFValueType, value: Any, item_type: GGUFValueType | None) -> bytes:
    if kind == GGUFValueType.STRING:
        return pack_string(value)
    if kind != GGUFValueType.ARRAY:
        return struct.pack("<" + _FORMATS[kind], value)
    assert item_type is not None, "an array needs the type of its items"
    head = struct.pack("<IQ", item_type, len(value))
    if item_type == GGUFValueType.STRING:
        return head + b"".join(map(pack_string, value))
    return head + struct.pack(f"<{len(value)}{_FORMATS[item_type]}", *value)


class HeaderBytes:
    """Reads a header front to back and refuses what is not there before asking for it.

    Attributes:
        name: What the messages call the file.
        size: Bytes of the whole file, which may be more than the source holds.
        position: Bytes read so far.
        n_items: Items of all arrays read so far.
    """

    def __init__(self, source: BinaryIO, size: int, name: str) -> None:
        """Start at the source's current position, the first byte of the GGUF."""
        self.name = name
        self.size = size
        self.position = 0
        self.n_items = 0
        self._source = source

    def refuse(self, what: str) -> RefusedError:
        """Make the error for a fault at the current position."""
        return RefusedError(f"{self.name}: {what} (near byte {self.position}); get the file again")

    def take(self, n_bytes: int, what: str) -> bytes:
        """Return the next ``n_bytes``; ``what`` names them in the error."""
        left = self.size - self.position
        if n_bytes > left:
            raise self.refuse(f"{what} needs {n_bytes} bytes, the file has {left} left")
        data = self._source.read(n_bytes)
        if len(data) != n_bytes:
            raise self.refuse(f"{what} needs {n_bytes} bytes, only {len(data)} could be read")
        self.position += n_bytes
        return data

    def u32(self, what: str) -> int:
        """Return the next unsigned 32-bit number."""
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        """Return the next unsigned 64-bit number."""
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, limit: int) -> str:
        """Return the next string, at most ``limit`` bytes of valid UTF-8."""
        n_bytes = self.u64(what)
        if n_bytes > limit:
            raise self.refuse(f"{what} is {n_bytes} bytes long, at most {limit} are read")
        try:
            return self.take(n_bytes, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} is no valid UTF-8") from error

    def value(self, key: str) -> Value:
        """Return the next value with its type; ``key`` names it in errors."""
        what = f"metadata {shown(key)}"
        kind = self._type(what)
        if kind != GGUFValueType.ARRAY:
            return Value(kind, self._scalar(kind, what))
        item_type = self._type(what)
        if item_type == GGUFValueType.ARRAY:
            raise self.refuse(f"{what} is an array of arrays, which llama.cpp does not read")
        return Value(kind, self._items(item_type, what), item_type)

    def _type(self, what: str) -> GGUFValueType:
        number = self.u32(what)
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self.refuse(f"{what} has type {number}, known are 0 to 12") from error

    def _scalar(self, kind: GGUFValueType, what: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(what, MAX_STRING_BYTES)
        return self._numbers(kind, 1, what)[0]

    def _items(self, item_type: GGUFValueType, what: str) -> list[Any]:
        count = self.u64(what)
        self.n_items += count
        if self.n_items > MAX_ITEMS:
            raise self.refuse(f"{what} has {count} items, all arrays may have {MAX_ITEMS}")
        if item_type != GGUFValueType.STRING:
            return self._numbers(item_type, count, what)
        if count * _LENGTH.size > self.size - self.position:
            raise self.refuse(f"{what} has {count} strings, more than the file can hold")
        return self._strings(count, what)

    def _strings(self, count: int, what: str) -> list[str]:
        """Return many strings; in one loop, for a vocabulary has half a million."""
        read, unpack = self._source.read, _LENGTH.unpack
        found = []
        for _ in range(count):
            head = read(8)
            n_bytes = unpack(head)[0] if len(head) == 8 else MAX_ITEM_BYTES + 1
            text = read(n_bytes) if n_bytes <= MAX_ITEM_BYTES else b""
            self.position += 8 + n_bytes
            if len(text) != n_bytes or self.position > self.size:
                raise self.refuse(f"{what} has an item that is cut or over {MAX_ITEM_BYTES} bytes")
            found.append(text)
        try:
            return [text.decode("utf-8") for text in found]
        except UnicodeDecodeError as error:
            raise self.refuse(f"{what} has an item that is no valid UTF-8") from error

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> list[Any]:
        code = _FORMATS[kind]
        data = self.take(count * struct.calcsize("<" + code), what)
        if kind == GGUFValueType.BOOL and data.strip(b"\0\1"):
            raise self.refuse(f"{what} has a boolean that is neither 0 nor 1")
        return list(struct.unpack(f"<{count}{code}", data))
