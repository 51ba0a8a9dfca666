"""Checkpoints that a kill at any instant cannot break: written aside, flushed, manifest last, one rename, then pruned.

A checkpoint is a folder named by pictures seen: safetensors files, state.json, and manifest.json with the size and
sha256 of each. It counts only when its manifest verifies; otherwise the one before it is used. No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.errors import GazeError

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
SPARE = 1.2  # free space asked for before writing, in sizes of the checkpoint


class NotSaved(GazeError):
    """A checkpoint could not be written; those before it are untouched."""

    exit_code = 74


def save(folder: Path, pictures: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Writes checkpoint `pictures` under `folder` and removes those before the newest `keep`.

    tensors: file stem -> tensors by name. state: JSON values; must hold "identity".
    Raises NotSaved naming the path and the free space when the disk is full or refuses.
    """
    final = folder / f"{pictures:012d}"
    aside = folder / f".tmp-{pictures}-{uuid.uuid4().hex[:8]}"
    size = sum(value.numel() * value.element_size() for values in tensors.values() for value in values.values())
    try:
        aside.mkdir(parents=True)
        if shutil.disk_usage(folder).free < SPARE * size:
            raise OSError("no space left on device")
        for stem, values in tensors.items():
            packed = {name: value.detach().cpu().contiguous() for name, value in values.items()}
            save_file(packed, aside / f"{stem}.safetensors")
        (aside / STATE).write_text(json.dumps(state | {"pictures": pictures}, indent=2))
        (aside / MANIFEST).write_text(_manifest(aside, pictures))
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if final.exists():  # broken, or the run would have gone on from it
            shutil.rmtree(final)
        os.replace(aside, final)
        _flush(folder)
        problem = verify(final)
        if problem is not None:
            raise OSError(f"after writing, {problem}")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise NotSaved(
            f"checkpoint {final} cannot be written: {error} (it takes {size / 1e6:.0f} MB)",
            "free some space or repair the disk, then the same command; it goes on from the checkpoint before",
        ) from error
    # Newer ones can only be broken ones that this run passed over: they must not push out sound ones.
    for old in [path for path in _folders(folder) if int(path.name) <= pictures][keep:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None without any. Broken ones are named in a warning and passed over.

    Raises GazeError when there are some but none verifies: to begin anew is for the user to decide.
    """
    paths = _folders(folder)
    for path in paths:
        problem = verify(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
    if paths:
        raise GazeError(f"none of the {len(paths)} checkpoints in {folder} is whole", "remove them to begin anew")
    return None


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left half written. Only for the process that writes here."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify(path: Path) -> str | None:
    """None when the manifest is, to the byte, the one that the files ask for, else what is wrong."""
    try:
        written = (path / MANIFEST).read_text()
        found = _manifest(path, int(path.name))
        if written == found:
            return None
        before, after = json.loads(written), json.loads(found)
        if before["format"] != FORMAT:
            return f"it has format {before['format']}, this version reads {FORMAT}"
        names = sorted(before["files"].keys() | after["files"].keys())
        wrong = [name for name in names if before["files"].get(name) != after["files"].get(name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"{', '.join(wrong) or MANIFEST} changed since it was written"


def load(path: Path, identity: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file stem and the state of a verified checkpoint; GazeError when it is of another recipe."""
    state = json.loads((path / STATE).read_text())
    if state["identity"] != identity:
        raise GazeError(
            f"checkpoint {path} was written by another recipe, other data, another tokenizer or another autoencoder",
            f"another out=DIR, or {path.parent.parent / 'recipe.yaml'}, the recipe that it was written by",
        )
    return {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}, state


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    paths = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and path.is_dir()]
    return sorted(paths, key=lambda path: int(path.name), reverse=True)


def _manifest(folder: Path, pictures: int) -> str:
    """The text of the manifest that fits the files now in the folder."""
    paths = sorted([*folder.glob("*.safetensors"), folder / STATE])
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in paths}
    return json.dumps({"format": FORMAT, "pictures": pictures, "files": files}, indent=2)


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
