"""Tar shards in WebDataset's layout, read by offset: of each picture, an index says where it lies and what it must be.

    manifest.json   how many pictures, and of each shard its size and sha256, and those of its index
    00000.tar       KEY.png (or .jpg, .webp, .bmp, .gif), KEY.txt, KEY.json of each picture
    00000.jsonl     the index: a Line for each picture, in order

Nothing is ever extracted, and a tar's own headers are not looked at; `check` does that.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diffusion.errors import GazeError

from .remote import fetch, fetch_text, is_url
from .source import LARGEST, MOST_REPEATS, Record, digest

FORMAT = 1
MANIFEST = "manifest.json"
INDICES = 32  # that a process keeps in memory; some megabytes each
SUFFIXES = ("png", "jpg", "webp", "bmp", "gif")

Count = Annotated[int, Field(ge=0, lt=2**62)]
Positive = Annotated[int, Field(gt=0)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Shard(_Strict):
    """name: without .tar and .jsonl. visits: of its pictures per epoch."""

    name: Annotated[str, Field(pattern="^[0-9A-Za-z_-]+$")]
    pictures: Count
    visits: Count
    bytes: Positive
    sha256: Hash
    index_bytes: Count
    index_sha256: Hash


class Manifest(_Strict):
    """source: fingerprint of what was packed. shard_size: how many of its pictures each shard was made of."""

    format: int
    source: str
    shard_size: Positive
    shards: tuple[Shard, ...]


class Line(_Strict):
    """One picture of a shard. name: what it was called before. offset, size: of its file within the tar, in bytes."""

    key: Annotated[str, Field(pattern="^[0-9A-Za-z_-]+$")]
    suffix: Annotated[str, Field(pattern=f"^({'|'.join(SUFFIXES)})$")]
    name: str
    captions: Annotated[tuple[str, ...], Field(min_length=1)]
    repeats: Annotated[int, Field(ge=0, le=MOST_REPEATS)]
    offset: Count
    size: Annotated[int, Field(gt=0, le=LARGEST)]
    sha256: Hash
    height: Positive
    width: Positive


class Shards:
    """A folder or URL of shards as a Source. cache: where shards of a URL are kept.

    Raises GazeError for a manifest that is missing, broken or of a later format, and for a shard of another size than
    the manifest says.
    """

    def __init__(self, root: str, cache: Path):
        self.root, self.cache = root.rstrip("/"), cache
        self.manifest = _manifest(self.root)
        self.shards = self.manifest.shards
        self.blocks = [shard.pictures for shard in self.shards]
        self.ends = list(accumulate(self.blocks))
        if not is_url(root):
            for shard in self.shards:
                _require_size(Path(self.root, f"{shard.name}.tar"), shard.bytes)
                _require_size(Path(self.root, f"{shard.name}.jsonl"), shard.index_bytes)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Record:
        shard, line = self._find(index)
        name = f"{shard.name}.tar/{line.key}.{line.suffix}"
        return Record(name, line.captions, line.sha256, line.height, line.width, line.repeats)

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it is not what the index says."""
        shard, line = self._find(index)
        content = self.part(self.tar(shard), line)
        if hashlib.sha256(content).hexdigest() != line.sha256:
            raise GazeError(
                f"{self.root}/{shard.name}.tar: {line.key}.{line.suffix} is not what its manifest says",
                f"python -m train data check {self.root} names all; copy the shard again",
            )
        return content

    def fingerprint(self) -> str:
        return digest(shard.index_sha256 for shard in self.shards)

    def tar(self, shard: Shard) -> Path:
        """A local file with the shard's content."""
        return self._local(f"{shard.name}.tar", shard.bytes, shard.sha256)

    def lines(self, shard: Shard) -> list[bytes]:
        """The shard's index, a Line in JSON for each picture. Raises GazeError when it is not the manifest's."""
        return _lines(self._local(f"{shard.name}.jsonl", shard.index_bytes, shard.index_sha256), shard.index_sha256)

    def line(self, shard: Shard, number: int) -> Line:
        """One line of the index."""
        try:
            return Line.model_validate_json(self.lines(shard)[number])
        except (ValidationError, IndexError) as error:
            raise _broken(f"{self.root}/{shard.name}.jsonl, line {number + 1}", error) from None

    @staticmethod
    def part(tar: Path, line: Line) -> bytes:
        """What lies in a tar where the line says."""
        try:
            with tar.open("rb") as file:
                file.seek(line.offset)
                return file.read(line.size)
        except OSError as error:
            raise GazeError(f"{tar} cannot be read: {error.strerror}", "copy the shard again") from None

    def _find(self, index: int) -> tuple[Shard, Line]:
        block = bisect_right(self.ends, index)
        shard = self.shards[block]
        return shard, self.line(shard, index - self.ends[block] + shard.pictures)

    def _local(self, name: str, size: int, sha256: str) -> Path:
        if not is_url(self.root):
            return Path(self.root, name)
        return fetch(f"{self.root}/{name}", self.cache / f"{sha256}{Path(name).suffix}", size, sha256)


@lru_cache(INDICES)
def _lines(file: Path, sha256: str) -> list[bytes]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise GazeError(f"{file} cannot be read: {error.strerror}", "copy the shards again") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise GazeError(f"{file} is not the index that the manifest names", "copy the shards again")
    return content.splitlines()


def _manifest(root: str) -> Manifest:
    where = f"{root}/{MANIFEST}"
    text = fetch_text(where) if is_url(root) else _text(Path(where))
    try:
        found = json.loads(text)
        version = found.get("format")
        if isinstance(version, int) and version > FORMAT:
            raise GazeError(f"{where} is of format {version}; this version reads {FORMAT}", "a later version of Gaze")
        return Manifest.model_validate_json(text)
    except (ValueError, AttributeError, RecursionError) as error:
        raise _broken(where, error) from None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise GazeError(
            f"{file} is missing", f"python -m train data pack SOURCE {file.parent} writes shards with their manifest"
        ) from None
    except (OSError, ValueError) as error:
        raise GazeError(f"{file} cannot be read: {error}", "copy it again") from None


def _broken(where: str, error: Exception) -> GazeError:
    problem = error.errors()[0] if isinstance(error, ValidationError) else None
    reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem else error
    return GazeError(f"{where} is not as `data pack` writes it: {reason}", "copy the shards again")


def _require_size(file: Path, size: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes, its manifest says {size}"
        raise GazeError(f"{file} {state}", f"copy it again; python -m train data check {file.parent} names all")
