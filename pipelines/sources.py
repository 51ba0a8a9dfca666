"""The files that a picture was made from, as settings name them: found again, and found unchanged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion.errors import GazeError

PICTURES = ("image", "mask_image")


def sha256(path: str) -> str:
    """Of a file, or of a folder's LoRA. Raises GazeError when it cannot be read."""
    from diffusion.lora import FILE  # imports torch, which is not needed to say what a PNG holds

    file = Path(path, FILE) if os.path.isdir(path) else Path(path)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise GazeError(f"{path!r:.300} cannot be read: {error}", "the file that the picture was drawn with") from None


def digests(settings: dict[str, Any], digest: Callable[[str], str] = sha256) -> dict[str, Any]:
    """The digest of each file, by the setting that names it; of the LoRAs a list. Empty for settings that name none."""
    return _each(settings, digest)


def located(settings: dict[str, Any], png: str) -> dict[str, Any]:
    """The settings, with each path that leads nowhere from here taken from the folder of the PNG, if it leads there."""

    def find(path: str) -> str:
        beside = os.path.join(os.path.dirname(png), path)
        return beside if os.path.exists(beside) and not os.path.exists(path) else path

    found = _each(settings, find)
    if "lora" in found:
        found["lora"] = [lora | {"path": path} for lora, path in zip(settings["lora"], found["lora"], strict=True)]
    return settings | found


def check_unchanged(settings: dict[str, Any], noted: Any, png: str) -> None:
    """Raises GazeError for the first file that is not there, or is another than when the digests were noted."""
    now = digests(settings)
    changed = next((name for name in now if isinstance(noted, dict) and noted.get(name, now[name]) != now[name]), None)
    if changed is not None:
        option = {"image": "--init", "mask_image": "--mask", "lora": "--lora"}[changed]
        raise GazeError(
            f"{png} was drawn with another {changed} than {settings[changed]!r:.300} is now",
            f"the file as it was, or {option} to take this one",
        )


def _each(settings: dict[str, Any], function: Callable[[str], str]) -> dict[str, Any]:
    """What the function says of the files, in the places of their paths."""
    found: dict[str, Any] = {name: function(settings[name]) for name in PICTURES if settings.get(name)}
    if settings.get("lora"):
        found["lora"] = [function(lora["path"]) for lora in settings["lora"]]
    return found
