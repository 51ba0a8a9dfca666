"""A checkpoint on the disk: a folder named by pictures seen, in safetensors and JSON. No pickle.

Its tensors are split over the processes that wrote it, `STEM-RANK.safetensors`, each whole in one file: any number of
processes reads what any number wrote, however they shard. manifest.json holds the rest: format, pictures, processes,
the run's state, size and sha256 of each file, and its own sha256 (in every format after the first). A checkpoint
counts only when all of that agrees to the bit.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.files import TYPES, replacing_file, sha256_of

from .processes import Processes
from .sharding import whole

FORMAT = 2
FIRST = 1  # the format whose manifest does not vouch for itself
MANIFEST = "manifest.json"
ORIGIN = "began-from"  # the checkpoint from which all newer ones come
DTYPES = {dtype: name for name, dtype in TYPES.items()}
ALONE = Processes()

Tensors = dict[str, dict[str, Tensor]]  # file stem -> tensors by name
K = TypeVar("K", str, tuple[str, str])


class Later(ValueError):
    """The checkpoint is sound, and in the format of a later version."""


def verify(path: Path, processes: Processes = ALONE) -> str | None:
    """None when every file is to the bit what the manifest says, and that what was written, else what is wrong.

    Every process calls it, hashes a share of the files and gets the same answer.
    """
    return next(filter(None, processes.gather(_problem(path, processes))), None)


def is_later(path: Path) -> bool:
    """Whether a later version wrote it, for which this one must neither take it for broken nor replace it."""
    try:
        _read_manifest(path)
    except Later:
        return True
    except Exception:  # it is broken in some other way, of which `verify` tells
        return False
    return False


def load(path: Path, own: Mapping[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """The tensors, on the CPU, and the state of a verified checkpoint.

    The tensors are views of the mapped files, which take memory only once touched and may be removed during the run:
    keep copies. own: identity and recipe of this run. GazeError: the checkpoint is of another recipe.
    """
    manifest = _read_manifest(path)
    state = manifest["state"]
    if state["identity"] != own["identity"]:
        changed = differences(state["recipe"], own["recipe"])
        other = f"by another recipe: {changed}" if changed else "over other data, another tokenizer or autoencoder"
        raise GazeError(
            f"checkpoint {path} was written {other}",
            f"another out=DIR, or {path.parent.parent / 'recipe.yaml'}, the recipe that it was written by",
        )
    tensors: Tensors = {}
    for name in manifest["files"]:
        tensors.setdefault(name.rpartition("-")[0], {}).update(load_file(path / name))
    return tensors, state


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The keys, as key.path, whose values differ between two recipes as JSON, with both values; "" for none."""
    old, new = _flat(before), _flat(now)
    names = [name for name in old | new if old.get(name) != new.get(name)]
    changed = [f"{name} {json.dumps(old.get(name))}, now {json.dumps(new.get(name))}" for name in names]
    return "; ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def own_share(tensors: Tensors, processes: Processes) -> Tensors:
    """The tensors that this process writes, whole and on the CPU. All gather together, one tensor at a time."""
    flat = {(stem, name): value for stem, values in tensors.items() for name, value in values.items()}
    owner = _shares({key: _bytes(value) for key, value in flat.items()}, processes.count)
    own: Tensors = {stem: {} for stem in tensors}
    for (stem, name), value in sorted(flat.items(), key=lambda item: item[0]):
        all_of_it = whole(value)
        if owner[stem, name] == processes.rank:
            own[stem][name] = all_of_it.detach().cpu().contiguous()
    return own


def _shares(sizes: Mapping[K, int], count: int) -> dict[K, int]:
    """The process that each falls to: the largest first, always to the process with the least so far."""
    loads = [(0, rank) for rank in range(count)]
    owner = {}
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        load, owner[key] = loads[0]
        heapq.heapreplace(loads, (load + sizes[key], owner[key]))
    return owner


def write_share(folder: Path, own: Tensors, rank: int) -> dict[str, dict[str, Any]]:
    """Writes this process's files. The first process's are there even when empty, so that no stem is lost."""
    return {
        f"{stem}-{rank:05d}.safetensors": _write_flushed(folder / f"{stem}-{rank:05d}.safetensors", _parts(values))
        for stem, values in own.items()
        if values or rank == 0
    }


def _parts(tensors: Mapping[str, Tensor]) -> Iterable[bytes | memoryview]:
    """A safetensors file in parts: the length of the header, the header, each tensor; nothing is copied."""
    # The widest types first: every tensor then begins at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries, end = {}, 0
    for name in names:
        value, begin = tensors[name], end
        end += _bytes(value)
        entries[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little")
    yield header
    for name in names:
        yield memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_flushed(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a file and waits until the disk has it. Its size and the sha256 of what was meant."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def publish(aside: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Seals the folder and gives it its name, in the place of what may have it: a broken one, or the same one."""
    _write_flushed(aside / MANIFEST, [_sealed(manifest)])
    _flush(aside)
    if final.exists():
        discard(final)
    os.replace(aside, final)
    _flush(final.parent)
    _flush(final.parent.parent)


def amend(path: Path, changes: Mapping[str, Any]) -> None:
    """Changes values of a sound checkpoint's state; killed at any instant it leaves the old manifest or the new one."""
    manifest = _read_manifest(path)
    manifest["state"] |= changes
    with replacing_file(path / MANIFEST) as aside:
        _write_flushed(aside, [_sealed(manifest)])


def discard(path: Path) -> None:
    """Removes a checkpoint; at no instant does half of one bear its name."""
    gone = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:8]}")
    os.replace(path, gone)
    shutil.rmtree(gone)


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The file of a manifest, which ends with the sha256 of what comes before."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=2).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError when it is not what was written, or of another format."""
    content = (path / MANIFEST).read_bytes()
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is no JSON: {error}") from None
    version, _ = manifest["format"], manifest.pop("sha256", None)
    if version != FIRST and content != _sealed(manifest):
        raise ValueError(f"{MANIFEST} changed since it was written")
    if version != FORMAT:
        age, kind = ("a later", Later) if version > FORMAT else ("an earlier", ValueError)
        raise kind(f"it has format {version}, of {age} version of Gaze, and this one reads {FORMAT}")
    return manifest


def _problem(path: Path, processes: Processes) -> str | None:
    """What is wrong with the manifest, the list of files, or this process's share of them."""
    try:
        manifest = _read_manifest(path)
        if path.name != name_of(manifest["pictures"]):
            return f"it is the checkpoint of {manifest['pictures']} pictures under another name"
        files = manifest["files"]
        owner = _shares({name: file["bytes"] for name, file in files.items()}, processes.count)
        wrong = {file.name for file in path.glob("*.safetensors")} ^ files.keys()
        mine = [name for name in files.keys() - wrong if owner[name] == processes.rank]
        wrong |= {name for name in mine if _described(path / name) != files[name]}
    except ValueError as error:
        return str(error)
    except (OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(sorted(wrong))} changed since it was written" if wrong else None


def name_of(pictures: int) -> str:
    return f"{pictures:012d}"


def folders(folder: Path, after: Path | None = None) -> list[Path]:
    """Checkpoint folders, newest first. after: only those of more pictures than this one."""
    paths = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    newer = [path for path in paths if after is None or int(path.name) > int(after.name)]
    return sorted(newer, key=lambda path: int(path.name), reverse=True)


def begin_from(folder: Path, origin: Path) -> None:
    """Sets aside, as `abandoned-*`, the checkpoints newer than `origin`, so that all that come then come from it, and
    notes that. Killed at any instant it leaves either the note or a state from which to do it again."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folders(folder, origin):
        os.replace(path, path.with_name(f"abandoned-{path.name}-{uuid.uuid4().hex[:8]}"))
    _flush(folder)
    _write_flushed(folder / ORIGIN, [_note(origin)])
    _flush(folder)


def began_from(folder: Path, origin: Path) -> bool:
    """Whether all checkpoints in the folder that are newer than `origin` come from it."""
    try:
        return (folder / ORIGIN).read_bytes() == _note(origin)
    except OSError:
        return False


def _note(origin: Path) -> bytes:
    return f"{origin.absolute()}\n".encode(errors="surrogateescape")  # the end of a line: it is whole


def total_bytes(tensors: Tensors) -> int:
    return sum(_bytes(value) for values in tensors.values() for value in values.values())


def _bytes(value: Tensor) -> int:
    return value.numel() * value.element_size()


def _described(path: Path) -> dict[str, Any]:
    """Size and sha256 of what is on the disk."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
