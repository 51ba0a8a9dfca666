"""What a PNG says about the picture in it, as settings for the next one."""

from __future__ import annotations

import os
import sys
from typing import Any

from diffusion.errors import GazeError

from .parameters import read_parameters
from .png import A_PICTURE_OF_OURS, PARAMETERS, SETTINGS, read_settings, read_texts
from .shipped import place_of
from .sources import check_unchanged, located

NUMBER = (int, float)
# The settings that can be asked for, and their types; a model's Request says what they mean.
TYPES: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": NUMBER,
    "guidance_rescale": NUMBER,
    "guidance_interval": list,
    "projected_guidance": bool,
    "scheduler": str,
    "spacing": str,
    "width": int,
    "height": int,
    "image": str,
    "strength": NUMBER,
    "mask_image": str,
    "weighting": str,
    "excite": list,
    "lora": list,
    "original_size": list,
    "crops_coords_top_left": list,
    "target_size": list,
    "model": str,
    "tokenizer": str,
    "prediction_type": str,
    "dtype": str,
    "tile": int,
}
OF_MODEL = ("model", "tokenizer", "prediction_type", "dtype", "tile")  # these say what draws, and belong together
DIGESTS = "sha256"  # of the files that the settings name
EXPANDED = "expanded"  # what the prompt was before a language model added to it, and which one did
SHIPPED = "default"  # the name inside a PNG of the model that comes with the package


def describe(path: str) -> tuple[dict[str, Any], list[str]]:
    """The settings inside a PNG, ours or else A1111's, and what of A1111's has no counterpart here.

    Raises GazeError when there are none.
    """
    texts = read_texts(path)
    if SETTINGS in texts or not texts.get(PARAMETERS, "").strip():
        return read_settings(path), []
    return read_parameters(texts[PARAMETERS])


def recall(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the picture in a PNG, with those that are given in their place. Says on stderr what it passes
    over.

    Raises GazeError when there are none, or those of several pictures, or one of the wrong type, and when the model or
    a file that they name is not there, or the file no longer the same.
    """
    settings, unknown = describe(path)
    if isinstance(settings.get("pictures"), list):
        raise GazeError(
            f"{path} is a sheet of {len(settings['pictures'])} pictures", "the file of one; gaze info prints them all"
        )
    if not TYPES.keys() & settings.keys():
        raise GazeError(f"the settings inside {path} are not of a picture", A_PICTURE_OF_OURS)
    noted = settings.pop(DIGESTS, {})
    settings.pop(EXPANDED, None)  # the prompt holds what was added
    unknown = [*unknown, *(name for name in settings if name not in TYPES)]
    if unknown:
        print(f"warning: {path} also says, and this does not repeat: {'; '.join(unknown)[:500]}", file=sys.stderr)
    found = {name: value for name, value in settings.items() if name in TYPES and value is not None}
    for name, value in found.items():
        kinds = TYPES[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise GazeError(f"{path} says {name} {value!r:.100}, which cannot be", A_PICTURE_OF_OURS)
    for lora in found.get("lora", []):
        parts = {name: type(value) for name, value in lora.items()} if isinstance(lora, dict) else {}
        if parts not in ({"path": str, "weight": float}, {"path": str, "weight": int}):
            raise GazeError(f"{path} says lora {lora!r:.100}, which cannot be", A_PICTURE_OF_OURS)
    if "model" in given:
        found = {name: value for name, value in found.items() if name not in OF_MODEL}
    elif not _is_here(found.get("model", SHIPPED)):
        raise GazeError(
            f"{path} was drawn with {found['model']!r:.200}, which is not here",
            "--model PATH; an id on the hub given there is fetched",
        )
    found = located({name: value for name, value in found.items() if name not in given}, path)
    check_unchanged(found, noted, path)
    return {**found, **given}


def _is_here(model: str) -> bool:
    """Whether it can be opened without a download, which nobody asked for who repeats a stranger's picture."""
    if model == SHIPPED or os.path.exists(place_of(model)):
        return True
    from diffusion.hub import cached_path  # imports torch, which is not needed to say what a PNG holds

    return cached_path(model) is not None
