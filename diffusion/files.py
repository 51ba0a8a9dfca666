"""JSON, weights and folders on the disk: what every part of a model is read and written with. No pickle."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import GazeError

MARKS = ("model_index.json", "vae")  # a folder with one of them holds a model, or its first part
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


def read_weights(folder: str | Path, stem: str = STEM) -> dict[str, Tensor]:
    """The tensors of one part as float32: one file or shards, with or without the fp16 variant.

    Raises GazeError when no safetensors file is there (pickle files are never opened) or one is broken.
    """
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder, stem):
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise GazeError(f"{path} cannot be read: {error}", "copy the file again; it may be cut short") from None
    # Copies, because what safetensors gives is the file itself, mapped into memory.
    return {name: value.to(torch.float32, copy=True) for name, value in tensors.items()}


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
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise GazeError(
            f"{folder} holds {pickled[0]}, a pickle, which can run code and is never opened",
            "save it again with save_pretrained(folder, safe_serialization=True)",
        )
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


def load_strictly(make: Callable[[], M], state: Mapping[str, Tensor], source: str | Path) -> M:
    """The module that `make` makes, with these weights, whose names and shapes must be exactly the module's.

    GazeError: with the first that are not. source: where they come from, for the message.
    """
    with torch.device("meta"):  # random weights would be thrown away
        module = make()
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in state]
    wrong += [f"unknown {name}" for name in state if name not in own]
    wrong += [
        f"{name} is {list(state[name].shape)}, the config says {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if wrong:
        shown = "; ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise GazeError(
            f"the weights in {source} do not fit its config.json: {shown}", "use the config saved with the weights"
        )
    module.load_state_dict(state, strict=True, assign=True)
    return module
