"""Packs captioned pictures of any place into tar shards (see shards.py).

Each shard is made of its own pictures of the place, by one process, aside, and renamed when it is whole; the same
pictures give the same bytes. What was interrupted goes on: shards that are there are not packed again.
"""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

from diffusion.errors import GazeError
from diffusion.files import flush, read_json, replacing_file, sha256_of, write_flushed
from pipelines.files import check_writable

from .look import examine, refuse_many
from .parallel import in_parallel
from .shards import FORMAT, MANIFEST, Line, Manifest, Shard
from .source import Place, Record, Skipped

PLAN = "unfinished.json"
STARTS = {b"\x89PNG": "png", b"\xff\xd8": "jpg", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif"}  # of files


def pack(place: Place, out: Path, shard_size: int = 10_000, workers: int = 0) -> tuple[Manifest, list[Skipped]]:
    """Writes shards of `shard_size` pictures of the place each, less those that do not decode or have no caption.

    These are also listed in out/skipped.txt. Goes on with what it finds in `out` of an earlier start.
    Raises GazeError when more than 5 % are skipped, when `out` holds something else, or cannot be written.
    """
    if shard_size < 1:
        raise GazeError(f"the shard size is {shard_size}", "--shard-size 10000")
    plan = {"format": FORMAT, "source": place.fingerprint(), "shard_size": shard_size}
    try:
        check_writable(out)
    except GazeError as error:
        raise GazeError(error.problem, "another folder") from None
    _require_same(out, plan)
    try:
        write_flushed(out / PLAN, [json.dumps(plan).encode()])
        for left in out.glob(".*-*"):
            left.unlink()
        count = -(-len(place) // shard_size)
        work = partial(_pack_one, place, out, shard_size)
        found = list(in_parallel(work, range(count), workers, "packing"))
        skipped = [Skipped(*row) for one in found for row in one["skipped"]]
        try:
            refuse_many(skipped, len(place))
        except GazeError:
            for number, one in enumerate(found):
                if one["skipped"]:  # repaired, they belong into the shard
                    _result(out, number).unlink(missing_ok=True)
            raise
        manifest = Manifest.model_validate({**plan, "shards": tuple(Shard(**one["shard"]) for one in found)})
        write_flushed(out / "skipped.txt", (f"{item.name}: {item.reason}\n".encode() for item in skipped))
        write_flushed(out / MANIFEST, [manifest.model_dump_json(indent=1).encode()])
        for number in range(count):
            _result(out, number).unlink(missing_ok=True)
        (out / PLAN).unlink()
    except OSError as error:
        raise _not_written(out, error) from None
    return manifest, skipped


def _require_same(out: Path, plan: dict[str, Any]) -> None:
    """Refuses a folder with anything else in it than what an earlier start of the same left."""
    for name in (PLAN, MANIFEST):
        if (out / name).exists():
            found = read_json(out / name)
            if any(found.get(key) != value for key, value in plan.items()):
                raise GazeError(f"{out} holds shards of other pictures, captions or shard size", "another folder")
            return
    if not all(path.match(f".{PLAN}-*") for path in out.iterdir()):  # half written, by a start killed at its first file
        raise GazeError(f"{out} holds something else than shards", "another folder")


def _pack_one(place: Place, out: Path, shard_size: int, number: int) -> dict[str, Any]:
    """The manifest's entry of a shard and which of its pictures were skipped, as they also stand in a file until the
    manifest is written: that file says that the shard is whole."""
    result = _result(out, number)
    if result.exists():
        return read_json(result)
    tar, index = result.with_suffix(".tar"), result.with_suffix(".jsonl")
    lines: list[bytes] = []
    skipped: list[Skipped] = []
    visits = 0
    try:
        with replacing_file(tar) as aside, aside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard:
                for place_index in range(number * shard_size, min((number + 1) * shard_size, len(place))):
                    try:
                        content, record = examine(place, place_index)
                    except GazeError as error:
                        skipped.append(Skipped(place[place_index].name, error.problem))
                        continue
                    lines.append(_add(shard, f"{place_index:09d}", content, record))
                    visits += record.repeats
            flush(file)
        write_flushed(index, (line + b"\n" for line in lines))
        entry = {"name": tar.stem, "pictures": len(lines), "visits": visits}
        entry |= {"bytes": tar.stat().st_size, "sha256": sha256_of(tar)}
        entry |= {"index_bytes": index.stat().st_size, "index_sha256": sha256_of(index)}
        found = {"shard": entry, "skipped": skipped}
        write_flushed(result, [json.dumps(found).encode()])
    except OSError as error:
        raise _not_written(out, error) from None
    return found


def _add(shard: tarfile.TarFile, key: str, content: bytes, record: Record) -> bytes:
    """Adds a picture's three members to the tar. Returns its line of the index."""
    suffix = next(suffix for start, suffix in STARTS.items() if content.startswith(start))
    known = {"name": record.name, "captions": record.captions, "repeats": record.repeats}
    known |= {"sha256": record.key, "height": record.height, "width": record.width}
    place = {"key": key, "suffix": suffix, "offset": shard.offset + tarfile.BLOCKSIZE, "size": len(content)}
    line = Line.model_validate(place | known)
    members = {suffix: content, "txt": record.captions[0].encode(), "json": json.dumps(known).encode()}
    for kind, value in members.items():
        member = tarfile.TarInfo(f"{key}.{kind}")  # of mode 644, owner 0 and time 0
        member.size = len(value)
        shard.addfile(member, io.BytesIO(value))
    return line.model_dump_json().encode()


def _result(out: Path, number: int) -> Path:
    return out / f"{number:05d}.json"


def _not_written(out: Path, error: OSError) -> GazeError:
    return GazeError(
        f"the shards in {out} cannot be written: {error.strerror or error}",
        "make room; the same command goes on with the shards that are there",
    )
