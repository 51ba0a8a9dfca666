"""Everything that can be wrong with captioned pictures or with shards of them, found without training on them."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from diffusion.errors import GazeError
from diffusion.files import sha256_of

from .decode import probe
from .look import look
from .parallel import in_parallel
from .remote import is_url
from .shards import SUFFIXES, Line, Shard, Shards
from .source import Place

MEMBER = re.compile(rf"[0-9A-Za-z_-]+\.({'|'.join(SUFFIXES)}|txt|json)")
MOST = 10  # problems of one shard that are named


def check(place: Place, workers: int = 0) -> Iterator[str]:
    """What is wrong, in lines. Shards: all of files, hashes, indices, members and pictures. Else: each picture."""
    if not isinstance(place, Shards):
        yield from (f"{name}: {reason}" for name, reason in look(place, workers)[1])
        return
    if not is_url(place.root):
        known = {shard.name for shard in place.shards}
        strays = sorted(path.name for path in Path(place.root).glob("*.tar") if path.stem not in known)
        yield from (f"{name}: the manifest does not name it" for name in strays)
    for problems in in_parallel(partial(_check_shard, place), range(len(place.shards)), workers, "checking"):
        yield from problems[:MOST]
        if len(problems) > MOST:
            yield f"... and {len(problems) - MOST} more of the same shard"


def _check_shard(shards: Shards, number: int) -> list[str]:
    shard = shards.shards[number]
    try:
        tar = shards.tar(shard)
        problems = [] if sha256_of(tar) == shard.sha256 else [f"{tar.name}: its sha256 is not the manifest's"]
        lines = shards.lines(shard)
    except (GazeError, OSError) as error:
        return [f"{shard.name}: {getattr(error, 'problem', error)}"]
    index = []
    for row, text in enumerate(lines, start=1):
        try:
            index.append(Line.model_validate_json(text))
        except ValidationError as error:
            problems.append(f"{shard.name}.jsonl, line {row}: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}")
    problems += [*_totals(shard, index), *_members(shard, tar, index)]
    for line in index:
        problems += _picture(shard, tar, line)
    return problems


def _totals(shard: Shard, index: list[Line]) -> Iterator[str]:
    for what, said, found in (
        ("pictures", shard.pictures, len(index)),
        ("visits", shard.visits, sum(line.repeats for line in index)),
    ):
        if said != found:
            yield f"{shard.name}: the manifest says {said} {what}, the index has {found}"
    for key, count in Counter(line.key for line in index).items():
        if count > 1:
            yield f"{shard.name}.jsonl: key {key} occurs {count} times"


def _members(shard: Shard, tar: Path, index: list[Line]) -> Iterator[str]:
    """What the tar's own headers say, which other programs follow, against the index."""
    places = {f"{line.key}.{line.suffix}": (line.offset, line.size) for line in index}
    wanted = Counter([*places, *(f"{line.key}.{kind}" for line in index for kind in ("txt", "json"))])
    found: Counter[str] = Counter()
    name = f"{shard.name}.tar"
    try:
        with tarfile.open(tar, "r:") as opened:
            for member in opened:
                found[member.name] += 1
                if not member.isreg():
                    yield f"{name}: {member.name!r} is a link, folder or device, not a file"
                elif not MEMBER.fullmatch(member.name):
                    yield f"{name}: {member.name!r} is no KEY.SUFFIX of {', '.join((*SUFFIXES, 'txt', 'json'))}"
                elif places.get(member.name, here := (member.offset_data, member.size)) != here:
                    yield f"{name}: {member.name} does not lie where the index says"
    except (tarfile.TarError, OSError, EOFError) as error:
        yield f"{name}: {error}"
    for member_name in sorted({*found, *wanted}):
        if found[member_name] != wanted[member_name]:
            yield f"{name}: {member_name!r} is there {found[member_name]} times, not {wanted[member_name]}"


def _picture(shard: Shard, tar: Path, line: Line) -> Iterator[str]:
    name = f"{shard.name}.tar: {line.key}.{line.suffix}"
    try:
        content = Shards.part(tar, line)
        if hashlib.sha256(content).hexdigest() != line.sha256:
            yield f"{name}: its sha256 is not the index's"
        elif probe(content) != (line.height, line.width):
            yield f"{name}: its size is not {line.height} x {line.width}"
    except GazeError as error:
        yield f"{name}: {error.problem}"
