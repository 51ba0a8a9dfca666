"""JSON, weights and folders on the disk: what every part of a model is read and written with. No pickle."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .errors import GazeError
from .header import Entry, read_header, refuse_pickle

# A folder with one of them holds a model, or a part of it, or a LoRA.
MARKS = ("model_index.json", "vae", "text_encoder", "pytorch_lora_weights.safetensors")
STEM = "diffusion_pytorch_model"
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool}
TYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "U64": torch.uint64}
TYPES |= {"I32": torch.int32, "U32": torch.uint32, "I16": torch.int16, "U16": torch.uint16}
TYPES |= {"I8": torch.int8, "U8": torch.uint8}
M = TypeVar("M", bound=torch.nn.Module)


@contextmanager
def replacing(folder: str | Path, marks: Sequence[str] = MARKS, kind: str = "a model") -> Iterator[Path]:
    """Gives a new folder to write into; after the block it stands in the place of `folder`, after an error nothing
    has changed. Raises GazeError when `folder` is a file, or has content that is not of this kind, because it has none
    of its marks: it would be lost."""
    folder = Path(os.path.realpath(folder))  # a link stays one: what it leads to is replaced
    if folder.exists() and not folder.is_dir():
        raise GazeError(f"{folder} is a file; it is not overwritten", "another folder")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in marks):
        raise GazeError(f"{folder} holds something that is not {kind}; it is not overwritten", "another folder")
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


def write_flushed(path: Path, parts: Iterable[bytes]) -> None:
    """A file of these parts, in the place of another or whole or not at all, on the disk when this returns."""
    with replacing_file(path) as aside, aside.open("wb") as file:
        file.writelines(parts)
        flush(file)


def flush(file: BinaryIO) -> None:
    """What was written into a file is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Of a file's content, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()


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

    dtype: what they are converted to; None gives them as they are.
    Raises GazeError when no safetensors file is there (pickle files are never opened) or one is broken.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_files(Path(folder), stem):
        tensors |= read_tensors(path, read_header(path).tensors, dtype)
    return tensors


def read_tensors(
    path: Path, entries: Mapping[str, Entry], dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a safetensors file that `entries`, of its checked header, tells the place of, with its name.

    They are read into memory of their own and converted (dtype None: not) one by one, so that the most that a load
    takes is the weights and the largest tensor; the file is never mapped. GazeError: the file cannot be read.
    """
    types = {name: TYPES[entry.dtype] for name, entry in entries.items()}
    sizes = {name: prod(entry.shape) * types[name].itemsize for name, entry in entries.items()}
    # One place for all that are converted: places of their own would leave holes between the results.
    converted = [sizes[name] for name, stored in types.items() if dtype not in (None, stored)]
    scratch = torch.empty(max(converted, default=0), dtype=torch.uint8)
    try:
        with path.open("rb") as file:
            for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
                keeps = dtype in (None, types[name])
                content = torch.empty(sizes[name], dtype=torch.uint8) if keeps else scratch[: sizes[name]]
                file.seek(entry.begin)
                if file.readinto(content.numpy()) < len(content):  # type: ignore[arg-type]
                    raise EOFError(f"it ends within {name}")
                yield name, content.view(types[name]).view(entry.shape).to(dtype, copy=not keeps)
    except (OSError, EOFError) as error:
        raise GazeError(f"{path} cannot be read: {error}", "copy the file again; it may be cut short") from None


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
    save_tensors(tensors, weights, {"format": "pt"})
    shutil.copymode(folder / "config.json", weights)  # safetensors makes files that only their owner can read


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """As safetensors' `save_file`, but what the system refuses is an OSError, as it is for any other file."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


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
