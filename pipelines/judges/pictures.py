"""What is asked for, and the pictures that there are already: files of prompts, folders of pictures with prompts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.errors import GazeError
from diffusion.prompts import escape, parse

from ..files import lines_of
from ..recall import describe

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
WAYS = 'metadata.jsonl with "file_name" and "text", NAME.txt beside NAME.png, or pictures written by gaze generate'


class Asked(NamedTuple):
    """prompt: as `gaze generate` reads it, with weights of words and escaped brackets. more: the other keys of its line
    in a JSONL file. file: the finished picture; None: it is to be drawn."""

    prompt: str
    more: dict[str, Any] = {}
    file: str | None = None

    @property
    def text(self) -> str:
        """What a judge reads: the prompt without weights and brackets that give them."""
        return "".join(chunk.text for chunk in parse(self.prompt))


def read_prompts(file: str) -> list[Asked]:
    """The prompts of a text file, one a line, or of a .jsonl file of objects with a key "prompt", as GenEval's
    evaluation_metadata.jsonl is. GazeError: none, and a line that is no such object."""
    if file.endswith(".jsonl"):
        lines = read_lines(Path(file), "a UTF-8 file, one prompt a line")
        asked = [Asked(_text(where, row, "prompt"), row) for where, row in lines]
    else:
        asked = [Asked(line) for line in lines_of(file)]
    if not asked:
        raise GazeError(f"{file!r} holds no prompt", "a UTF-8 file, one prompt a line")
    return asked


def read_pictures(folder: str, with_prompts: bool = True) -> list[Asked]:
    """The pictures of a folder, in the order of metadata.jsonl, else of their sorted names.

    A prompt is the line's "prompt" or "text" (of several the first), else the content of NAME.txt beside NAME.png, else
    what the PNG says that it was drawn from. with_prompts: False: it is "" where there is none.
    Raises GazeError for a folder without pictures, and names the first that has no prompt, or that is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise GazeError(f"{folder!r} {'is no folder' if root.exists() else 'does not exist'}", "a folder of pictures")
    metadata = root / "metadata.jsonl"
    asked = _listed(metadata, with_prompts) if metadata.is_file() else _found(root, with_prompts)
    if not asked:
        raise GazeError(f"{folder!r} holds no picture", f"a folder with {', '.join(SUFFIXES)} files")
    return asked


def read_lines(file: Path, hint: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a JSONL file is, for messages, and its object. GazeError: one that is none."""
    try:
        lines = file.read_bytes().split(b"\n")  # bytes, because a text would also be split inside of captions
    except OSError as error:
        raise GazeError(f"{file} cannot be read: {error.strerror or error}", hint) from error
    for number, line in enumerate(lines, start=1):
        where = f"{file}, line {number}"
        try:
            row = json.loads(line.decode("utf-8-sig")) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise GazeError(f"{where}: {error}", hint) from None
        if row is not None and not isinstance(row, dict):
            raise GazeError(f"{where}: {row!r:.100} is no JSON object", hint)
        if row is not None:
            yield where, row


def picture_of(where: str, row: dict[str, Any], root: Path) -> str:
    """The path of a line's picture. GazeError: it is not there, or outside the folder."""
    name = row.get("file_name")
    file = root / name if isinstance(name, str) and "\0" not in name else None
    if file is None or not file.is_file():
        raise GazeError(f"{where}: there is no picture file_name {name!r:.200}", "the name of a file in that folder")
    if not file.resolve().is_relative_to(root.resolve()):
        raise GazeError(f"{where}: {name!r:.200} lies outside the folder", "move the picture into the folder")
    return str(file)


def _listed(metadata: Path, with_prompts: bool) -> list[Asked]:
    asked = []
    for where, row in read_lines(metadata, 'a line such as {"file_name": "1.png", "text": "a red circle"}'):
        key = "prompt" if "prompt" in row else "text"
        prompt = escape(_text(where, row, key)) if with_prompts or row.get(key) else ""
        asked.append(Asked(prompt, row, picture_of(where, row, metadata.parent)))
    return asked


def _text(where: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    text = value[0] if isinstance(value, list) and value else value
    if not isinstance(text, str) or not text.strip():
        raise GazeError(f"{where}: {key} is {value!r:.100}, which is no prompt", f'a line such as {{"{key}": "a cat"}}')
    return text


def _found(root: Path, with_prompts: bool) -> list[Asked]:
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    prompt_of: Callable[[Path], str] = _prompt_of if with_prompts else lambda _: ""
    return [Asked(prompt_of(path), {}, str(path)) for path in files]


def _prompt_of(picture: Path) -> str:
    beside = picture.with_suffix(".txt")
    prompt: Any = None
    if beside.is_file():
        try:
            prompt = escape(beside.read_text(encoding="utf-8-sig").strip())
        except (OSError, ValueError) as error:
            raise GazeError(f"{beside} cannot be read: {error}", "a UTF-8 text, the prompt of the picture") from None
    elif picture.suffix.lower() == ".png":
        try:
            prompt = describe(str(picture))[0].get("prompt")
        except GazeError:
            prompt = None  # what the file lacks is said below, with all ways to give it
    if not isinstance(prompt, str) or not prompt.strip():
        raise GazeError(f"{picture} has no prompt", WAYS)
    return prompt
