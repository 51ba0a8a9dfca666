"""A model's folder <-> a single file in the original key layout. Safetensors only; written whole or not at all."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .autoencoder import AutoencoderConfig, current_name
from .clip import PREFIX, UNUSED, CLIPTextConfig, pooled_width, write_text_encoder
from .config import Config
from .errors import GazeError
from .files import (
    STEM,
    differences,
    read_json,
    read_weights,
    replacing,
    replacing_file,
    shapes_of,
    write_json,
    write_part,
)
from .header import Entry, Header, refuse_pickle
from .hub import local_path
from .noise import NoiseSchedule
from .original_names import to_original
from .pretrained import model_index
from .single_file import PAD, open_single_file, tokenizer_of
from .structure import SD1, SD2, SDXL, Structure, layout, recognise
from .tokenizer import Tokenizer
from .unet import UNetConfig

SUFFIX = ".safetensors"
# What pictures do not depend on: the size trained at, and tokens that only a search for the prompt's end looks for.
NOTES = {"sample_size", "bos_token_id", "eos_token_id", "pad_token_id"}


def convert(
    source: str | Path,
    target: str | Path,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype | None = None,
) -> Structure:
    """Writes the model folder `source` as the file `target`, or the single file `source` as the folder `target`.

    tokenizer: for a single file, as `load_model` takes it; a file that is written holds none. prediction_type: instead
    of what the source says. dtype: of the weights; None keeps theirs.
    Returns what was converted. Raises GazeError for a source that is broken, or that the other side cannot say, and for
    a target that cannot be written; nothing is left half-written then.
    """
    source, target = local_path(source), Path(target)
    refuse_pickle(source)
    if not os.path.exists(source):
        raise GazeError(f"model {str(source)!r} does not exist", "check the path")
    read = [source.resolve()] + ([] if tokenizer is None else [Path(tokenizer).resolve()])
    if any(target.resolve() in (path, *path.parents) for path in read):
        raise GazeError(f"{target} holds what is converted, and would replace it", "another place to write to")
    same = os.path.exists(target) and target.is_dir() == source.is_dir()
    if same or source.is_dir() != (target.suffix == SUFFIX):
        wanted = f"a file's name that ends in {SUFFIX}" if source.is_dir() else "a folder's name"
        raise GazeError(f"{source} cannot become {target}: what is written must be the other of the two", wanted)
    try:
        if source.is_dir():
            return _to_file(source, target, prediction_type, dtype)
        return _to_folder(source, target, tokenizer, prediction_type, dtype)
    except (OSError, SafetensorError) as error:
        raise GazeError(f"{target} cannot be written: {error}", "another place, with room for the model") from None


def _to_folder(
    source: Path, target: Path, tokenizer: str | Path | None, prediction_type: str | None, dtype: torch.dtype | None
) -> Structure:
    file = open_single_file(source, prediction_type)
    structure = file.structure
    words = {part: tokenizer_of(file, part, tokenizer) for part in structure.texts}
    with replacing(target) as aside:
        write_json(aside / "model_index.json", model_index(structure.family.pipeline, structure.family.scheduler))
        write_json(aside / "scheduler" / "scheduler_config.json", structure.schedule)
        write_part(aside / "unet", structure.unet.to_diffusers(), file.read("unet", dtype))
        write_part(aside / "vae", structure.vae.to_diffusers(), file.read("vae", dtype))
        for part, config in structure.texts.items():
            projection = {"text_encoder_2": {"projection_dim": structure.pooled}}.get(part, {})
            write_text_encoder(aside / part, {**config.to_diffusers(), **projection}, file.read(part, dtype))
            words[part].save_pretrained(aside / part.replace("text_encoder", "tokenizer"))
    return structure


def _to_file(source: Path, target: Path, prediction_type: str | None, dtype: torch.dtype | None) -> Structure:
    structure = read_structure(source, prediction_type)
    places = layout(structure)
    metadata = {"format": "pt", "modelspec.title": target.stem, **_stated(structure), **_pads(source, structure)}
    entries = {name: Entry("F32", place.shape) for name, place in places.items()}
    _check_kept(source, structure, Header(entries, metadata))
    states = {part: _weights(source, part, shapes, dtype) for part, shapes in structure.shapes().items()}
    tensors = {}
    for original, place in places.items():
        pieces = [states[place.part][name] for name in place.names]
        value = to_original(original, pieces[0] if len(pieces) == 1 else torch.cat(pieces))
        tensors[original] = value.contiguous()
    with replacing_file(target) as aside:
        save_file(tensors, aside, metadata)
    return structure


def read_structure(folder: Path, prediction_type: str | None = None) -> Structure:
    """The structure of a model folder, weights unread. prediction_type: instead of what the folder says.

    Raises GazeError for a config that is missing or not supported.
    """
    two = bool(read_json(folder / "model_index.json").get("text_encoder_2"))
    unet = UNetConfig.from_diffusers(read_json(folder / "unet" / "config.json"))
    family = SDXL if two else SD2 if unet.use_linear_projection else SD1
    texts = {part: read_json(folder / part / "config.json") for part in family.texts}
    pooled = pooled_width(texts["text_encoder_2"], folder / "text_encoder_2") if two else None
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    if prediction_type is not None:
        schedule |= {"prediction_type": prediction_type}
    NoiseSchedule.from_config(schedule)
    return Structure(
        family,
        unet,
        AutoencoderConfig.from_diffusers(read_json(folder / "vae" / "config.json")),
        {part: CLIPTextConfig.from_diffusers(config) for part, config in texts.items()},
        pooled,
        schedule,
    )


def _stated(structure: Structure) -> dict[str, str]:
    """The metadata for what the keys do not say."""
    prediction = structure.schedule.get("prediction_type", "epsilon")
    size = structure.unet.sample_size
    height, width = size if isinstance(size, tuple) else (size, size)
    factor = 2 ** (len(structure.vae.block_out_channels) - 1)
    resolution = {} if height is None else {"modelspec.resolution": f"{width * factor}x{height * factor}"}
    return {"modelspec.prediction_type": "v" if prediction == "v_prediction" else prediction, **resolution}


def _pads(folder: Path, structure: Structure) -> dict[str, str]:
    """The metadata for tokens that fill prompts, where they are not those of the family."""
    pads = {}
    for part, (kind, _) in structure.family.texts.items():
        place = folder / part.replace("text_encoder", "tokenizer")
        if place.is_dir():
            words = Tokenizer.from_pretrained(place)
            if words.pad != (words.end if kind == "clip" else 0):
                pads[PAD.format(part)] = str(words.pad)
    return pads


def _check_kept(folder: Path, own: Structure, header: Header) -> None:
    """Raises GazeError when who reads a file with this header would take it for another model."""
    hint = "keep the folder; the original layout is for models of Stable Diffusion's own structure"
    try:
        read = recognise(header)
    except GazeError as error:
        raise GazeError(f"{folder} cannot be told in one file: {error.problem}", hint) from None
    pairs: list[tuple[str, Config, Config]] = [("unet", own.unet, read.unet), ("vae", own.vae, read.vae)]
    pairs += [(part, config, read.texts[part]) for part, config in own.texts.items()]
    for part, config, other in pairs:
        values, others = _plain(config), _plain(other)
        for option in values:
            if option not in NOTES and values[option] != others[option]:
                raise GazeError(
                    f"{folder}/{part} has {option} {values[option]!r}, which a single file cannot say; "
                    f"it would be read as {others[option]!r}",
                    hint,
                )
    if not torch.equal(*(NoiseSchedule.from_config(s.schedule).sigmas_T for s in (own, read))):
        raise GazeError(f"{folder}/scheduler has noise levels of its own, which a single file cannot say", hint)


def _plain(config: Config) -> dict[str, Any]:
    """The options, those that may differ between levels for each level."""
    values = dataclasses.asdict(config)
    if isinstance(config, UNetConfig):
        per_level = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
        values |= {option: config.per_level(option) for option in per_level}
    return values


def _weights(
    folder: Path, part: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors of a part of a folder, by their names here. Raises GazeError for others than `shapes`."""
    is_text = part.startswith("text_encoder")
    state = read_weights(folder / part, "model" if is_text else STEM, dtype)
    if is_text:
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
        state = {name: value for name, value in state.items() if name in shapes or name not in UNUSED}
    if part == "vae":
        state = {current_name(name): value for name, value in state.items()}
    wrong = differences(shapes_of(state), shapes)
    if wrong:
        raise GazeError(f"the weights in {folder / part} do not fit its config.json: {wrong}", "copy the folder again")
    return state
