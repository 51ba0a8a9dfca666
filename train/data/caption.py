"""Captions for the pictures of a folder by a model, written into its metadata.jsonl, where `Folder` reads them.

What is written is kept in a file beside it, a line a picture, until all are done; metadata.jsonl is then replaced in
one step. So a command that was killed goes on with the next picture, and nobody reads half of it.

    captions-0.unfinished    {"model", "prompt", "tokens", ...}     of the first process; the first line
                             {"file_name", "text": [captions]}      each other line
"""

from __future__ import annotations

import fcntl
import json
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError, nearest
from diffusion.files import flush, write_flushed
from pipelines.borrowed import device_of
from pipelines.checks import number, whole
from pipelines.files import check_writable
from pipelines.images import open_picture
from pipelines.processes import Processes

from ..memory import is_lack_of_memory
from ..randomness import randomness
from .captioner import Captioner, captions, open_captioner, prepare
from .folder import SUFFIXES, entry_of, lines_of, pictures_in, read_file, require_folder, text_beside
from .parallel import in_parallel
from .source import Entry, Skipped

UNFINISHED = "captions-{}.unfinished"
WIDEST = 2048  # pixels of a side; a larger picture is made smaller before the model's own processor sees it
EXISTING = ("keep", "replace", "add")


class Asked(NamedTuple):
    """What captions are asked for: another of these values gives others.

    model: folder or id on the hub. prompt: see `open_captioner`. captions: of each picture. tokens, beams,
    temperature: see `write`. seed: with a temperature, the words of a picture depend on this and on its name.
    existing: of captions that are there: "keep" leaves such pictures alone, "replace" puts the new ones in their place,
    "add" puts them behind.
    """

    model: str
    prompt: str | None = None
    captions: int = 1
    tokens: int = 40
    beams: int = 1
    temperature: float = 0.0
    seed: int = 0
    existing: str = "keep"


class Report(NamedTuple):
    """captioned: pictures with new captions; kept: with those that were there; skipped: with none."""

    captioned: int
    kept: int
    skipped: list[Skipped]


class Row(NamedTuple):
    """A picture. line: of metadata.jsonl, b"" where it names it not; said: what that line says. captions: that are
    there, but for blank ones. asked: whether it is to get new ones."""

    name: str
    line: bytes
    said: dict[str, Any]
    captions: tuple[str, ...]
    asked: bool


class Batch(NamedTuple):
    """inputs: of the captioner, a row for each name."""

    names: list[str]
    inputs: dict[str, Tensor]
    skipped: list[Skipped]


def caption(
    root: Path,
    asked: Asked,
    batch_size: int = 16,
    workers: int = 0,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    group: Processes | None = None,
) -> Report | None:
    """Captions the pictures of a folder and writes its metadata.jsonl; goes on where an earlier start ended.

    batch_size: pictures captioned at once. workers: processes that decode the next ones meanwhile. device, dtype: None
    takes a GPU if there is one, and the model's own. group: processes that share the work; all but the first get None.
    Raises GazeError for values that cannot be, a folder without pictures or that cannot be written, and what
    `open_captioner` raises.
    """
    group = group or Processes()
    _check(asked, batch_size)
    require_folder(root)
    check_writable(root)
    todo = [*dict.fromkeys(row.name for row in _rows(root, asked.existing) if row.asked)]
    done = _done(root, asked)
    mine = [name for name in todo[group.rank :: group.count] if name not in done]
    skipped: list[Skipped] = []
    if mine:
        captioner = open_captioner(asked.model, asked.prompt, device_of(device), dtype)
        skipped = _write_captions(root, captioner, asked, mine, batch_size, workers, UNFINISHED.format(group.rank))
    # Waits for all of them: none says so before its last caption is on the disk.
    told = group.collect(group.count, [skipped], lambda value: json.dumps(value).encode(), json.loads)
    return None if told is None else _finish(root, asked, [Skipped(*one) for part in told for one in part])


def _check(asked: Asked, batch_size: int) -> None:
    least = {"captions": asked.captions, "tokens": asked.tokens, "beams": asked.beams, "batch-size": batch_size}
    for name, value in least.items():
        whole(name, value, 1)
    whole("seed", asked.seed, 0)
    if number("temperature", asked.temperature) < 0:
        raise GazeError(f"temperature is {asked.temperature}", "0 for the likeliest words, 1 to draw as the model does")
    if asked.existing not in EXISTING:
        raise GazeError(f"existing captions cannot be {asked.existing!r:.100}", nearest(asked.existing, EXISTING))
    if asked.temperature and asked.beams > 1:
        raise GazeError("beams take the likeliest words, a temperature draws them", "one of the two")
    if not asked.temperature and asked.captions > asked.beams:
        hint = f"--beams {asked.captions} for as many likely ones, or --temperature 1 to draw them"
        raise GazeError(f"{asked.captions} captions of each picture, and no way to different ones", hint)


def _rows(root: Path, existing: str) -> list[Row]:
    """The lines of metadata.jsonl, then the pictures that it does not name. Raises GazeError."""
    metadata, base = root / "metadata.jsonl", root.resolve()
    rows = []
    for place, line in lines_of(metadata) if metadata.is_file() else []:
        name, entry = entry_of(metadata, base, place, line)
        rows.append(_row(name, line, json.loads(line.decode("utf-8-sig")), entry, existing))
        if "words" in rows[-1].said and existing != "keep":
            problem = f"{metadata}, line {place}: words with their objects belong to the caption that is there"
            raise GazeError(problem, "--existing keep, or a copy of the folder without them")
    named = [row.name for row in rows] + [str(row.said["masks"]) for row in rows if "masks" in row.said]
    known = {(base / name).resolve() for name in named}
    for path in pictures_in(root):
        if path.resolve() not in known:
            name, captions = path.relative_to(root).as_posix(), text_beside(path)
            if not path.resolve().is_relative_to(base):
                problem = f"{path} is a link to a file outside the folder, which metadata.jsonl may not name"
                raise GazeError(problem, "a copy of the picture in its place")
            rows.append(_row(name, b"", {"file_name": name}, Entry(name, captions), existing))
    if not rows:
        raise GazeError(f"{root} holds no picture", f"files that end in {', '.join(SUFFIXES)}")
    return rows


def _row(name: str, line: bytes, said: dict[str, Any], entry: Entry, existing: str) -> Row:
    captions = tuple(filter(str.strip, entry.captions))
    return Row(name, line, said, captions, entry.repeats > 0 and not (captions and existing == "keep"))


def _done(root: Path, asked: Asked) -> dict[str, list[str]]:
    """The captions, by file, that all processes of this and earlier starts wrote. Raises GazeError where they were
    asked for otherwise."""
    found: dict[str, list[str]] = {}
    for path in root.glob(UNFINISHED.format("*")):
        first, *rows = [json.loads(line) for line in _whole_lines(path)] or [asked._asdict()]
        other = {key: value for key, value in first.items() if asked._asdict().get(key) != value}
        if other:
            key, value = next(iter(other.items()))
            raise GazeError(
                f"{path} holds captions of an earlier start with {key} {value!r:.100}, "
                f"now it is {asked._asdict().get(key)!r:.100}",
                "the same options, which finish it; or remove the file, and with it these captions",
            )
        found |= {row["file_name"]: row["text"] for row in rows}
    return found


def _whole_lines(path: Path) -> list[bytes]:
    """The lines up to the first that is cut short, as a start that was killed leaves it."""
    return list(takewhile(_is_json, path.read_bytes().split(b"\n")[:-1]))


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _write_captions(
    root: Path, captioner: Captioner, asked: Asked, names: list[str], batch_size: int, workers: int, journal: str
) -> list[Skipped]:
    """Captions the pictures and appends them to the journal; gives those that cannot be captioned."""
    skipped: list[Skipped] = []
    work = partial(_read_batch, root, captioner._replace(network=None), names, batch_size)
    with _continued(root / journal, asked) as file:
        for batch in in_parallel(work, range(-(-len(names) // batch_size)), workers, "captioning"):
            skipped += batch.skipped
            if batch.names:
                texts = _captions(captioner, asked, batch)
                rows = zip(batch.names, texts, strict=True)
                file.write(b"".join(_line({"file_name": name, "text": text}) for name, text in rows))
                flush(file)
    return skipped


def _continued(path: Path, asked: Asked) -> BinaryIO:
    """The journal, to be written on behind its last whole line. Raises GazeError while another command writes it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise GazeError(f"{path} is being written by another command", "the same when that one is done") from None
    file.truncate(sum(len(line) + 1 for line in _whole_lines(path)))
    if path.stat().st_size == 0:
        file.write(_line(asked._asdict()))
        flush(file)
    return file


def _captions(captioner: Captioner, asked: Asked, batch: Batch) -> list[list[str]]:
    each = range(asked.captions)
    draws = [[randomness(asked.seed, one, f"caption {name}") for one in each] for name in batch.names]
    try:
        return captions(captioner, batch.inputs, asked.tokens, asked.beams, asked.captions, asked.temperature, draws)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        raise GazeError(f"memory does not suffice: {error}", "a smaller --batch-size, fewer --beams") from error


def _read_batch(root: Path, captioner: Captioner, names: list[str], batch_size: int, number: int) -> Batch:
    """The batch of this number, as the network reads it. Pictures are decoded as for training, then shrunk and cut as
    the model's own processor does it."""
    pictures: dict[str, Image.Image] = {}
    skipped: list[Skipped] = []
    for name in names[number * batch_size :][:batch_size]:
        try:
            picture = open_picture(read_file(root / name))
            picture.thumbnail((WIDEST, WIDEST), Image.Resampling.LANCZOS)
            pictures[name] = picture
        except GazeError as error:
            skipped.append(Skipped(name, error.problem))
    try:
        return Batch([*pictures], prepare(captioner, [*pictures.values()]) if pictures else {}, skipped)
    except Exception:  # whatever a processor says of one of them, such as one of a single row of pixels
        refused = {name: reason for name, picture in pictures.items() if (reason := _refusal(captioner, picture))}
    fit = [picture for name, picture in pictures.items() if name not in refused]
    skipped += [Skipped(name, reason) for name, reason in refused.items()]
    return Batch([name for name in pictures if name not in refused], prepare(captioner, fit) if fit else {}, skipped)


def _refusal(captioner: Captioner, picture: Image.Image) -> str:
    try:
        prepare(captioner, [picture])
    except Exception as error:  # as above
        return f"the model's processor refuses it: {type(error).__name__}: {error}"[:300]
    return ""


def _finish(root: Path, asked: Asked, skipped: list[Skipped]) -> Report:
    """Puts all captions into metadata.jsonl, whose other lines stay what they are."""
    texts = _done(root, asked)
    rows = _rows(root, asked.existing)
    lines = []
    for row in rows:
        new = texts.get(row.name, []) if row.asked else []
        if row.line and not new:
            lines.append(row.line + b"\n")
            continue
        before = () if new and asked.existing == "replace" else row.captions
        text = [*dict.fromkeys([*before, *new])]
        if text:
            lines.append(_line({**row.said, "text": text[0] if len(text) == 1 else text}))
    if texts:
        write_flushed(root / "metadata.jsonl", lines)
    for path in root.glob(UNFINISHED.format("*")):
        path.unlink()
    silent = [Skipped(name, "the model says nothing of it") for name, text in texts.items() if not text]
    kept = {row.name for row in rows if row.captions} - texts.keys()
    return Report(len(texts) - len(silent), len(kept), [*skipped, *silent])


def _line(value: dict[str, Any]) -> bytes:
    """Of JSON. A byte of a file's name that is no text becomes an escape, which JSON has for it too."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
