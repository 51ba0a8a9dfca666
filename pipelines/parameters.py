"""A picture's settings as the AUTOMATIC1111 web UI writes them into a PNG, under the keyword "parameters".

    a red apple, (shiny:1.2)
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1, Size: 64x96, Model: emoji

A prompt with a line that begins with "Negative prompt:" reads back as two, and spaces around a line are lost. What is
exact is in our own chunk (png.py); this is for other programs, and for reading theirs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

NEGATIVE = "Negative prompt:"
# Its samplers that are ours or diffusers'. "DPM fast", "DPM adaptive", "DPM++ 2S a" and "Restart" are not.
SAMPLERS = {
    "DDIM": "ddim",
    "DPM++ 2M": "dpmpp_2m",
    "DPM++ 2M SDE": "dpmpp_2m_sde",
    "DPM++ 2M SDE Heun": "sde-dpmsolver++:solver_type=heun",
    "DPM++ 3M SDE": "dpmpp_3m_sde",
    "DPM++ SDE": "dpmsolver_sde",
    "DPM2": "kdpm2",
    "DPM2 a": "kdpm2_ancestral",
    "Euler": "euler",
    "Euler a": "euler_ancestral",
    "Heun": "heun",
    "LCM": "lcm",
    "LMS": "lms",
    "PLMS": "pndm",
    "UniPC": "unipc",
}
# Its spacings of noise levels. Of two for one of ours, the first is written.
SCHEDULE_TYPES = {
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "exponential",  # at its default rho, 1
    "Beta": "beta",
    "Uniform": "linear",
    "Normal": "linear",
    "Simple": "trailing",
    "SGM Uniform": "trailing",
    "DDIM": "leading",
}
# What "Automatic" means for a sampler; for the others it is the model's own levels.
AUTOMATIC = dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a"), "karras") | dict.fromkeys(
    ("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "exponential"
)
OUR_SAMPLER = re.compile(r"[a-z][a-z0-9_+-]*(:.*)?|[A-Za-z0-9]+Scheduler(:.*)?", re.S)
# A key and its value, quoted or up to a comma. Bounded, so that the search is linear in the text.
_FIELD = re.compile(r'(?<!\w)(\w[\w \-/]{1,60}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
# What a prompt may hold there and is only words here: other networks, and words that change between steps.
_UNREAD = re.compile(r"<\w{1,20}:[^<>\n]{1,200}>|\[[^][():\n]{0,200}:[^][():\n]{0,200}:[0-9.]{1,10}\]")
FEWEST = 3  # fields of a last line that is not a prompt's
_NUMBER = re.compile(r"[+-]?[0-9]{1,20}(\.[0-9]{0,20})?(e[+-]?[0-9]{1,3})?")


def write_parameters(settings: dict[str, Any]) -> str:
    """The text for a picture's settings, as far as the web UI has words for them."""
    samplers = {ours: theirs for theirs, ours in SAMPLERS.items()}
    spacings = {ours: theirs for theirs, ours in reversed(SCHEDULE_TYPES.items())}
    scheduler = settings["scheduler"]
    fields = {
        "Steps": settings["num_inference_steps"],
        "Sampler": samplers.get(scheduler, scheduler),
        "Schedule type": spacings.get(settings.get("spacing", "")),
        "CFG scale": settings["guidance_scale"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": PurePath(settings["model"]).stem if "model" in settings else None,
    }
    line = ", ".join(f"{key}: {quote(str(value))}" for key, value in fields.items() if value is not None)
    negative = settings.get("negative_prompt")
    return "\n".join([settings["prompt"], *([f"{NEGATIVE} {negative}"] if negative else []), line])


def read_parameters(text: str) -> tuple[dict[str, Any], list[str]]:
    """The settings that such a text means, and what in it means nothing here, each as "key: value".

    Any text can be read: at the least it is a prompt. Time is linear in its length.
    """
    *lines, last = text.strip().split("\n")
    fields = _FIELD.findall(last)
    if len(fields) < FEWEST:
        lines, fields = [*lines, last], []
    lines = [line.strip() for line in lines]
    split = next((number for number, line in enumerate(lines) if line.startswith(NEGATIVE)), len(lines))
    negative = [line.removeprefix(NEGATIVE).strip() for line in lines[split:]]
    said = {key: unquote(value.strip()) for key, value in fields}
    settings: dict[str, Any] = {
        "prompt": "\n".join(lines[:split]).strip("\n"),
        "negative_prompt": "\n".join(negative).strip("\n"),
    }
    settings |= _sampler(said)
    for key, read in _READ.items():
        found = read(said[key]) if key in said else None
        if found is not None:
            settings |= found
            del said[key]
    unread = [*_UNREAD.findall(settings["prompt"]), *_UNREAD.findall(settings["negative_prompt"])]
    return settings, [*unread, *(f"{key}: {value:.60}" for key, value in said.items())]


def quote(value: str) -> str:
    """A value with a comma, a colon or a line end stands in quotes, as JSON has them."""
    return json.dumps(value, ensure_ascii=False) if set(value) & {",", ":", "\n"} else value


def unquote(value: str) -> str:
    if value[:1] + value[-1:] != '""' or len(value) < 2:
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _sampler(said: dict[str, str]) -> dict[str, Any]:
    """Scheduler and spacing, whose fields are taken out of what is said; one without a counterpart is left in it."""
    name, kind = said.get("Sampler", ""), said.get("Schedule type", "")
    base, _, ending = name.rpartition(" ")
    if not kind and ending in ("Karras", "Exponential"):  # as it was written before version 1.9
        name, kind = base, ending
    scheduler = SAMPLERS.get(name) or (name if OUR_SAMPLER.fullmatch(name) else None)
    spacing = AUTOMATIC.get(name) if kind == "Automatic" else SCHEDULE_TYPES.get(kind)
    if scheduler is not None:
        del said["Sampler"]
    if spacing is not None or kind == "Automatic":
        said.pop("Schedule type", None)
    found = {"scheduler": scheduler, "spacing": spacing}
    return {key: value for key, value in found.items() if value is not None}


def _whole(setting: str) -> Callable[[str], dict[str, Any] | None]:
    return lambda value: {setting: int(value)} if re.fullmatch(r"[0-9]{1,19}", value) else None


def _number(value: str) -> dict[str, Any] | None:
    return {"guidance_scale": float(value)} if _NUMBER.fullmatch(value) and math.isfinite(float(value)) else None


def _size(value: str) -> dict[str, Any] | None:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value)
    return {"width": int(match[1]), "height": int(match[2])} if match else None


_READ: dict[str, Callable[[str], dict[str, Any] | None]] = {
    "Steps": _whole("num_inference_steps"),
    "CFG scale": _number,
    "Seed": _whole("seed"),
    "Size": _size,
}
