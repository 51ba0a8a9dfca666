"""JSON, weights and folders on the disk: what every part of a model is read and written with. No pickle."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GazeError
from .header import read_header, refuse_pickle

MARKS = ("model_index.json", "vae", "text_encoder")  # a folder with one of them holds a model, or a part of it
STEM = "diffusion_pytorch_model"
M = TypeVar("M", bound=torch.nn.Module)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """Gives a new folder to write into; after the block it stands in the place of `folder`, after an error nothing
    has changed. Raises GazeError when `folder` has content that is no model: it would be lost."""
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in MARKS):
        raise GazeError(f"{folder} holds something that is not a model; it is not overwritten", "another folder")
    aside = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    gone = folder.with_name(f"{aside.name}-old")
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            os.rename(folder, gone)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Gives a new file to write, as `replacing` gives a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        aside.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; GazeError names the file when it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise GazeError(f"{path} is missing", "a folder written by diffusers' save_pretrained has it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise GazeError(f"{path} cannot be read as JSON: {error}", "copy the file again") from None
    if not isinstance(value, dict):
        raise GazeError(f"{path} holds {type(value).__name__}, not a JSON object", "copy the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_weights(folder: str | Path, stem: str = STEM, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """The tensors of one part: one file or shards, with or without the fp16 variant.

    dtype: what they are converted to; None gives them as they are, and as long as they are used the file must stay.
    Raises GazeError when no safetensors file is there (pickle files are never opened) or one is broken.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        read_header(path)  # within limits, which load_file lacks
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise GazeError(f"{path} cannot be read: {error}", "copy the file again; it may be cut short") from None
    # Copies, because what safetensors gives is the file itself, mapped into memory.
    return tensors if dtype is None else {name: value.to(dtype, copy=True) for name, value in tensors.items()}


def weight_files(folder: Path, stem: str = STEM) -> list[Path]:
    """The safetensors files of a part, fp32 preferred over the fp16 variant."""
    for variant in ("", ".fp16"):
        single = folder / f"{stem}{variant}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index{variant}.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
            if not names or any(Path(name).name != name for name in names):
                raise GazeError(f"{index} names no files of its folder", "use a copy from a source you trust")
            return [folder / name for name in names]
    for path in sorted(folder.glob("*.bin")):
        refuse_pickle(path)
    raise GazeError(f"{folder} holds no {stem}.safetensors", "copy the folder again; it may be incomplete")


def write_part(
    folder: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    stem: str = STEM,
) -> None:
    """Writes config.json and one safetensors file; `dtype` converts the weights, None keeps theirs."""
    folder = Path(folder)
    write_json(folder / "config.json", config)
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in state.items()}
    weights = folder / f"{stem}.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", weights)  # safetensors makes files that only their owner can read


def differences(
    found: Mapping[str, Sequence[int]], wanted: Mapping[str, Sequence[int]], judge: str = "the config says"
) -> str:
    """The first tensors that are missing, unknown or of another shape, and how many more there are; "" if none."""
    wrong = [f"missing {name}" for name in wanted if name not in found]
    wrong += [f"unknown {name}" for name in found if name not in wanted]
    wrong += [
        f"{name} is {list(found[name])}, {judge} {list(wanted[name])}"
        for name in wanted
        if name in found and tuple(found[name]) != tuple(wanted[name])
    ]
    return "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def load_strictly(make: Callable[[], M], state: Mapping[str, Tensor], source: str | Path) -> M:
    """The module that `make` makes, with these weights, whose names and shapes must be exactly the module's.

    GazeError: with the first that are not. source: where they come from, for the message.
    """
    with torch.device("meta"):  # random weights would be thrown away
        module = make()
    wrong = differences(shapes_of(state), shapes_of(module.state_dict()))
    if wrong:
        raise GazeError(
            f"the weights in {source} do not fit its config.json: {wrong}", "use the config saved with the weights"
        )
    module.load_state_dict(state, strict=True, assign=True)
    return module
