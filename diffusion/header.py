"""The header of a safetensors file, read within limits before anything else looks at the file. No pickle."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .errors import GazeError

LONGEST = 16 * 2**20  # bytes of a header; one of 97 MB takes 8 s to read
MOST = 20_000  # tensors
DEEPEST = 8  # dimensions of a tensor
WIDEST = 2**20  # the largest dimension
PLAIN = LONGEST // 4  # bytes; a longer header must be ASCII without escapes, because other texts take 4 bytes a letter
# More than so many tensors have: what is counted before the reading bounds its time and memory.
COUNTS = {b",": 16 * MOST, b"[": 4 * MOST, b"{": 4 * MOST}
QUOTES = 12 * MOST
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
BYTES |= {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))
PICKLE_SUFFIXES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")


class Entry(NamedTuple):
    """dtype: as safetensors writes it, "F32", "BF16", ... begin: its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0


class Header(NamedTuple):
    """tensors: by name. metadata: texts that a program left beside them."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def refuse_pickle(path: Path, start: bytes = b"") -> None:
    """Raises GazeError when the name, or the first bytes, say that the file is a pickle."""
    if path.suffix.lower() in PICKLE_SUFFIXES or start.startswith(PICKLE_STARTS):
        raise GazeError(
            f"{path} is a pickle, which can run code and is never opened",
            "its .safetensors version; docs/models.md says how one is made of it where it can do no harm",
        )


def read_header(path: str | Path) -> Header:
    """Names, types and shapes of the tensors in a file; the tensors themselves are not read.

    Raises GazeError when this is no safetensors file, or one that is cut short, contradicts itself (ranges that
    overlap or leave holes, a name that occurs twice) or goes beyond the limits above.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 9 or length > min(size - 8, LONGEST) or start[8:] != b"{":
                refuse_pickle(path, start)
                problem = f"{path} cannot be read as safetensors: its first bytes speak of a header of {length} bytes"
                raise GazeError(f"{problem}; the most is {LONGEST}", "copy the file again; it may be cut short")
            text = _counted(start[8:] + file.read(length - 1))
        return _checked(text, 8 + length, size)
    except OSError as error:
        raise GazeError(f"{path} cannot be read: {error.strerror}", "check the path and who may read it") from None
    except (ValueError, RecursionError) as error:
        raise GazeError(f"{path} cannot be read as safetensors: {error}", "copy the file again") from None


def _counted(text: bytes) -> str:
    """The text, if it holds no more than a header may. Raises ValueError with the reason."""
    if len(text) > PLAIN and (not text.isascii() or b"\\u" in text):
        raise ValueError(f"it has {len(text)} bytes and letters beyond ASCII; the most is {PLAIN}")
    quotes = text.count(b'"') - text.count(b'\\"')
    if quotes > QUOTES or any(text.count(mark) > most for mark, most in COUNTS.items()):
        raise ValueError(f"it has more than {MOST} tensors")
    return text.decode("utf-8")


def _checked(text: str, first: int, size: int) -> Header:
    """The header that `text` is, of a file of `size` bytes whose tensors begin at `first`. ValueError: the reason."""
    content = json.loads(text, object_pairs_hook=_without_repeats)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    if len(content) > MOST:
        raise ValueError(f"it has more than {MOST} tensors")
    for name, entry in content.items():
        if not name.isprintable() or len(name) > 256:
            raise ValueError(f"{name[:40]!r} is no name of a tensor")
        if not _sound(entry):
            raise ValueError(f"the entry of {name} is broken: {reprlib.repr(entry)[:80]}")
    tensors, end = {}, 0
    for name, entry in sorted(content.items(), key=lambda item: item[1]["data_offsets"]):
        begin, after = entry["data_offsets"]
        if begin != end or after - begin != prod(entry["shape"]) * BYTES[entry["dtype"]]:
            raise ValueError(f"{name} is not where its shape and the tensors before it say")
        tensors[name] = Entry(entry["dtype"], tuple(entry["shape"]), first + begin)
        end = after
    if first + end != size:
        raise ValueError(f"it has {size - first} bytes of tensors, not the {end} that its header speaks of")
    return Header(tensors, metadata)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _sound(entry: Any) -> bool:
    """Types and limits of one tensor's entry. A tensor without elements has the shape [0], a mark of some programs."""
    if not isinstance(entry, Mapping) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return False
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(isinstance(numbers, list) and all(type(n) is int for n in numbers) for numbers in (shape, offsets))
    return (
        whole
        and isinstance(dtype, str)
        and dtype in BYTES
        and len(offsets) == 2
        and len(shape) <= DEEPEST
        and (shape == [0] or all(0 < side <= WIDEST for side in shape))
    )
