"""Which colour does an object have? As GenEval judges it (Ghosh et al. 2023): a model of CLIP's kind, with nothing else
trained, picks one for what is inside its box.

Shapes: K colours, B boxes, E values of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .clip import open_embedder, prepared
from .detect import Box, NameColours

PHRASES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")


def open_colours(name: str, colours: Sequence[str], dtype: str = "float32") -> NameColours:
    """What names colours, with a model of a folder or the hub. GazeError: it embeds no texts and pictures, and what
    `open_judge` raises."""
    return colour_namer(*open_embedder(name, "--colours", dtype), colours)


def colour_namer(model: Any, processor: Any, colours: Sequence[str]) -> NameColours:
    """Names the colour of what is in a box, of `colours`: that whose embedding is nearest. A colour's embedding is the
    mean of those of three phrases with the object's name.

    model, processor: transformers' CLIP, SigLIP and the like. A box is cut out to whole pixels, at least one each way.
    """

    @cache
    def known(name: str) -> Tensor:
        phrases = [phrase.format(colour=colour, name=name) for colour in colours for phrase in PHRASES]
        inputs = prepared(model, processor, phrases)
        of_each_E = F.normalize(model.get_text_features(**inputs).pooler_output.float(), dim=-1)
        return F.normalize(of_each_E.unflatten(0, (len(colours), len(PHRASES))).mean(dim=1), dim=-1)

    @torch.inference_mode()
    def name_colours(picture: Image.Image, boxes: Sequence[Box], name: str) -> list[str]:
        cuts = [picture.crop(_whole(box, picture)) for box in boxes]
        inputs = processor(images=cuts, return_tensors="pt").to(model.device, model.dtype)
        seen_BE = F.normalize(model.get_image_features(**inputs).pooler_output.float(), dim=-1)
        return [colours[number] for number in (seen_BE @ known(name).T).argmax(dim=1).tolist()]

    return name_colours


def _whole(box: Box, picture: Image.Image) -> tuple[int, int, int, int]:
    """The box in whole pixels, inside the picture and not empty."""
    left, right = _side(box[0], box[2], picture.width)
    top, bottom = _side(box[1], box[3], picture.height)
    return left, top, right, bottom


def _side(low: float, high: float, size: int) -> tuple[int, int]:
    first = min(max(round(low), 0), size - 1)
    return first, min(max(round(high), first + 1), size)
