"""Where pictures go: names from prompts, checked before any work is done; files of prompts. Imports no torch or PIL."""

import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from diffusion.errors import GazeError


def slug(prompt: str, longest: int = 60) -> str:
    """A file name's part: the prompt's letters and digits of any script, lower case, joined by "-"."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", prompt).casefold().replace("_", " "))
    name = "-".join(words).encode("utf-8", "ignore")[:longest]  # file systems limit bytes, not letters
    return name.decode("utf-8", "ignore").strip("-") or "picture"


def plan_paths(out: str | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """One path per picture.

    out: None: names from prompt and seed, in this folder, never one that exists; a folder (it exists or the name ends
    in "/"): the same inside it; a file: exactly that one, replaced if it exists. Of several pictures, picture i gets
    i in place of "{i}", or "-i" before the suffix.
    Raises GazeError for a suffix other than .png, and for places that cannot be written (see `check_writable`).
    """
    if out is None or out.endswith("/") or os.path.isdir(out):
        paths = unused(Path(out or "."), [f"{slug(p)}-{seed}" for p, seed in zip(prompts, seeds, strict=True)])
    else:
        paths = [png_path(out)] if len(prompts) == 1 and "{i}" not in out else _numbered(png_path(out), len(prompts))
    for folder in {path.parent for path in paths}:
        check_writable(folder)
    for path in paths:
        if os.path.isdir(path):
            raise GazeError(f"{str(path)!r} is a folder, so no picture can be written there", "another name with -o")
    return paths


def png_path(name: str) -> Path:
    """The path of a picture; without a suffix, .png is added."""
    path = Path(name)
    if path.suffix.lower() == ".png":
        return path
    if path.suffix[1:].isalpha():
        raise GazeError(f"{name!r} does not end in .png; pictures are written as PNG", f"-o {path.with_suffix('.png')}")
    return path.with_name(path.name + ".png")


def check_writable(folder: Path) -> None:
    """Makes the folder if needed and proves that files can be made in it. Raises GazeError with the reason."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GazeError(f"folder {str(folder)!r} cannot be written: {reason}", "another place with -o") from error


def _numbered(path: Path, count: int) -> list[Path]:
    pattern = str(path) if "{i}" in str(path) else str(path.with_name(f"{path.stem}-{{i}}{path.suffix}"))
    return [Path(pattern.replace("{i}", str(index))) for index in range(count)]


def unused(folder: Path, names: Sequence[str]) -> list[Path]:
    """Paths of pictures of these names in a folder, numbered where a name is taken."""
    paths: list[Path] = []
    for name in names:
        path, again = folder / f"{name}.png", 2
        while path.exists() or path in paths:
            path, again = folder / f"{name}-{again}.png", again + 1
        paths.append(path)
    return paths


def lines_of(file: str | None) -> list[str]:
    """The prompts of a text file: its lines that are not blank."""
    if file is None:
        return []
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise GazeError(
            f"prompts file {file!r} cannot be read: {error}", "a UTF-8 text file, one prompt a line"
        ) from error
    return [line.strip() for line in lines if line.strip()]
