"""Captioned pictures from a folder: metadata.jsonl (`file_name`, `text`; the imagefolder convention) or .txt files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffusion.errors import GazeError

from .source import LARGEST, MOST_REPEATS, Entry, Listed

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


class Folder(Listed):
    """The pictures of a folder as a Place, in the order of metadata.jsonl or of sorted file names.

    Raises GazeError naming file and line when a line of captions is not what it should be.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        require_folder(self.root)
        metadata = self.root / "metadata.jsonl"
        found = _from_metadata(metadata) if metadata.is_file() else _from_text_files(self.root)
        if not found:
            raise GazeError(f"{root} holds no captioned picture", _hint(self.root))
        self.files, self.entries = [file for file, _ in found], [entry for _, entry in found]

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it cannot be read."""
        return read_file(self.root / self.files[index])


def require_folder(root: Path) -> None:
    """Raises GazeError when it is none."""
    if not root.is_dir():
        problem = "is no folder" if root.exists() else "does not exist"
        raise GazeError(f"data folder {str(root)!r} {problem}", "check data.folder")


def read_file(path: Path) -> bytes:
    """A picture's file. Raises GazeError when it cannot be read, or is too large to be one."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST:
                raise GazeError(f"the file has {size} bytes, more than {LARGEST}")
            return file.read()
    except OSError as error:
        raise GazeError(f"the file cannot be read: {error.strerror}") from None


def _hint(root: Path) -> str:
    for key, pattern in (("shards", "manifest.json"), ("table", "*.parquet"), ("dataset", "*.arrow")):
        if any(root.glob(pattern)):
            return f"data.{key}={root}"
    return "metadata.jsonl, or a .txt file beside each picture"


def _from_metadata(metadata: Path) -> list[tuple[str, Entry]]:
    root = metadata.parent.resolve()
    return [entry_of(metadata, root, number, line) for number, line in lines_of(metadata)]


def lines_of(metadata: Path) -> list[tuple[int, bytes]]:
    """The lines of metadata.jsonl that are not blank, with their numbers from 1."""
    # Bytes, because text would also be split at the line separators of Unicode, which may stand inside a caption.
    lines = enumerate(metadata.read_bytes().split(b"\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def entry_of(metadata: Path, root: Path, number: int, line: bytes) -> tuple[str, Entry]:
    """The file that a line names, and what it says of it. root: the folder, resolved. Raises GazeError with the
    line's number."""
    where = f"{metadata}, line {number}"
    try:
        row = json.loads(line.decode("utf-8-sig"))
        name, text, repeats = row["file_name"], row.get("text"), row.get("repeats", 1)
        file = (root / name).resolve()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise GazeError(
            f"{where}: no JSON object with file_name and text ({type(error).__name__}: {error})",
            'a line such as {"file_name": "1.png", "text": "a red circle"}',
        ) from None
    captions = [] if text is None else [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise GazeError(f"{where}: text is neither a caption nor a list of captions", "put it in quotes")
    if type(repeats) is not int or not 0 <= repeats <= MOST_REPEATS:
        raise GazeError(f"{where}: repeats is {repeats!r}", f"0 to {MOST_REPEATS}; 0 leaves the picture out")
    if not file.is_relative_to(root):
        raise GazeError(f"{where}: {name!r} lies outside the folder", "move the picture into the folder")
    return name, Entry(encodable(name), tuple(map(encodable, captions)), repeats)


def pictures_in(root: Path) -> list[Path]:
    """The files of a folder, and of those in it, that have a picture's suffix."""
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def _from_text_files(root: Path) -> list[tuple[str, Entry]]:
    pictures = pictures_in(root)
    names = [path.relative_to(root).as_posix() for path in pictures]
    return [(name, Entry(encodable(name), text_beside(path))) for name, path in zip(names, pictures, strict=True)]


def text_beside(picture: Path) -> tuple[str, ...]:
    """The caption in the .txt file of a picture's name, if there is one."""
    file = picture.with_suffix(".txt")
    try:
        return (file.read_text(encoding="utf-8-sig").strip(),)
    except FileNotFoundError:
        return ()
    except ValueError as error:
        raise GazeError(f"{file} is not UTF-8: {error}", "save it as UTF-8") from None


def encodable(text: str) -> str:
    """Without single surrogates, which no file of ours can hold: they come from JSON and from odd file names."""
    return text.encode("utf-8", "replace").decode()
