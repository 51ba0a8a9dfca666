"""What is written inside a PNG beside its pixels: our settings as JSON, and text for other programs.

Reading looks at the file's chunks alone and decodes no pixel; it imports neither torch nor PIL.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from diffusion.errors import GazeError

if TYPE_CHECKING:
    from PIL import Image

SETTINGS = "gaze"  # keywords of the text chunks
PARAMETERS = "parameters"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
LONGEST = 2**22  # bytes of a text that is read: JSON's objects are some twenty times as large in memory
MOST_CHUNKS = 100_000
A_PICTURE_OF_OURS = "a picture written by gaze generate"


def save_png(
    image: Image.Image, path: str | Path, settings: dict[str, Any] | None = None, parameters: str | None = None
) -> None:
    """Writes a PNG with `settings` (JSON values) and `parameters` (see parameters.py) inside; the file is there whole
    or not at all.

    The settings are ASCII JSON, so every string comes back as it was, NUL and single surrogates included; only two
    surrogates that form a pair come back as the character they encode. NaN and infinity are refused. `parameters` is
    Latin-1 or else UTF-8, and has ? for a NUL or a surrogate, which neither may hold.
    Raises GazeError when the folder cannot be written or the settings are not JSON.
    """
    from PIL import PngImagePlugin

    path = Path(path)
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        try:
            info.add_text(SETTINGS, json.dumps(settings, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise GazeError(f"the settings of {path} cannot be written as JSON: {error}") from error
    if parameters is not None:
        info.add_text(PARAMETERS, parameters.replace("\0", "?").encode("utf-8", "replace").decode())
    aside = path.with_name(f".{uuid4().hex}.tmp")
    try:
        image.save(aside, format="PNG", pnginfo=info)
        os.replace(aside, path)
    except OSError as error:
        raise GazeError(f"{path} cannot be written: {error.strerror or error}", "another file with -o") from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that `save_png` put inside. Raises GazeError for anything that is not such a PNG."""
    text = read_texts(path).get(SETTINGS)
    if text is None:
        raise GazeError(f"{path} has no gaze settings inside", A_PICTURE_OF_OURS)
    try:
        settings = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise GazeError(f"the gaze settings inside {path} are broken: {error}", A_PICTURE_OF_OURS) from error
    if not isinstance(settings, dict):
        raise GazeError(f"the gaze settings inside {path} are not an object", A_PICTURE_OF_OURS)
    return settings


def read_texts(path: str | Path) -> dict[str, str]:
    """The texts under the two keywords. A file may hold anything else: it is passed over and costs no memory.

    Raises GazeError for a file that is not a whole PNG, and for a text that is broken, too long or there twice.
    """
    texts: dict[str, str] = {}
    try:
        if not Path(path).is_file():
            raise ValueError("there is no such file")
        for keyword, text in _texts(Path(path)):
            if keyword in texts:
                raise ValueError(f"it holds {keyword!r} more than once")
            texts[keyword] = text
    except (OSError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise GazeError(f"{path} cannot be read as a PNG: {reason}", A_PICTURE_OF_OURS) from error
    return texts


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """Keyword and text of each chunk of text that has one of the two keywords."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(8) != SIGNATURE:
            raise ValueError("it does not begin like one")
        for _ in range(MOST_CHUNKS):
            head = file.read(8)
            length, kind = struct.unpack(">I4s", head.ljust(8))
            end = file.tell() + length + 4
            if len(head) < 8 or end > size:
                raise ValueError("it is cut off")
            if kind == b"IEND":
                return
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword, found, _ = file.read(min(length, 80)).partition(b"\0")
                if found and keyword.decode("latin-1") in (SETTINGS, PARAMETERS):
                    yield keyword.decode("latin-1"), _text(file, end - length - 4, length, kind, len(keyword) + 1)
            file.seek(end)
        raise ValueError(f"it has more than {MOST_CHUNKS} chunks")


def _text(file: Any, start: int, length: int, kind: bytes, skip: int) -> str:
    """The text of a chunk, after its keyword (PNG, third edition, 11.3.3)."""
    if length > LONGEST:
        raise ValueError(f"its text has {length} bytes, more than {LONGEST}")
    file.seek(start)
    body, (checksum,) = file.read(length), struct.unpack(">I", file.read(4))
    if zlib.crc32(kind + body) != checksum:
        raise ValueError("a checksum is wrong")
    data, compressed = body[skip:], False
    if kind == b"zTXt":
        data, compressed = data[1:], True
    elif kind == b"iTXt":
        if data.count(b"\0", 2) < 2:
            raise ValueError("a text has no language")
        compressed, data = data[:1] == b"\1", data[2:].split(b"\0", 2)[2]
    if compressed:
        unpacking = zlib.decompressobj()
        data = unpacking.decompress(data, LONGEST)
        if unpacking.unconsumed_tail:
            raise ValueError(f"its text has more than {LONGEST} bytes")
    return data.decode("utf-8" if kind == b"iTXt" else "latin-1")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number of JSON")
