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

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.errors import GazeError

FORMAT = 1
MANIFEST = "manifest.json"


def save(folder: Path, pictures: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Writes checkpoint `pictures` under `folder` and removes all but the newest `keep`.

    tensors: file stem -> tensors by name. state: JSON values; must hold "identity".
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".tmp-{pictures}-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    for stem, values in tensors.items():
        save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, aside / f"{stem}.safetensors")
    (aside / "state.json").write_text(json.dumps(state | {"pictures": pictures}, indent=2))
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(aside.iterdir())}
    (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, "pictures": pictures, "files": files}, indent=2))
    for path in aside.iterdir():
        _flush(path)
    _flush(aside)
    final = folder / f"{pictures:012d}"
    if final.exists():  # a run that was resumed from before this point writes it again
        shutil.rmtree(final)
    os.replace(aside, final)
    _flush(folder)
    problem = verify(final)
    if problem:
        raise GazeError(f"checkpoint {final} does not verify after writing: {problem}", "check the disk")
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, or None. Broken ones are named in a warning and passed over."""
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for path in _folders(folder):
        problem = verify(path)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=2)
    return None


def verify(path: Path) -> str | None:
    """None when every file is there with its size and sha256, else what is wrong."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            if (path / name).stat().st_size != expected["bytes"]:
                return f"{name} has not its {expected['bytes']} bytes"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} has changed (sha256)"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load(path: Path, identity: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors by file stem and the state of a verified checkpoint; GazeError when it is of another recipe."""
    state = json.loads((path / "state.json").read_text())
    if state["identity"] != identity:
        raise GazeError(
            f"checkpoint {path} was written by another recipe or other data",
            "another out=..., or the recipe that stands in recipe.yaml beside the checkpoints",
        )
    return {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}, state


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((path for path in folder.glob("[0-9]*") if path.is_dir()), reverse=True)


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
