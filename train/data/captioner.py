"""A model of transformers that says what pictures show: attention of a language model over an image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError
from pipelines.borrowed import open_borrowed, open_part, write

from ..memory import is_lack_of_memory

NEEDED = "a captioning model, such as BLIP, GIT, ViT-GPT2 or LLaVA"
ASKED = "Describe this picture in one sentence."  # of a model that answers
APART = "vision-encoder-decoder"  # image processor and tokenizer are not joined to one processor
PROMPTLESS = (APART, "git")


class Captioner(NamedTuple):
    """prompt: what the caption goes on from, or answers; None: nothing but the picture."""

    network: Any
    processor: Any
    tokenizer: Any
    prompt: str | None


def open_captioner(
    model: str | Path, prompt: str | None, device: torch.device, dtype: torch.dtype | None = None
) -> Captioner:
    """A captioning model by its folder or id on the hub; arguments as for `open_borrowed`. It is asked about a grey
    picture at once. prompt: None asks ASKED of a model with a chat template, and nothing of another.

    Raises GazeError when the model is not there, no captioning model, or does not work with the prompt.
    """
    network, folder = open_borrowed(model, "AutoModelForImageTextToText", NEEDED, device, dtype)
    kind = network.config.model_type
    if prompt is not None and kind in PROMPTLESS:
        raise GazeError(f"{folder} is a {type(network).__name__}, which takes no prompt", "leave out --prompt")
    processor = open_part("AutoImageProcessor" if kind == APART else "AutoProcessor", folder)
    tokenizer = open_part("AutoTokenizer", folder) if kind == APART else getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise GazeError(f"{folder} has no processor of pictures and words", "the whole folder of the model")
    tokenizer.padding_side = "left"  # words are added on the right
    if prompt is None and getattr(processor, "chat_template", None):
        prompt = ASKED
    captioner = Captioner(network, processor, tokenizer, prompt)
    try:
        captions(captioner, prepare(captioner, [Image.new("RGB", (64, 64), "gray")]), tokens=2)
    except Exception as error:  # of any class: what a model cannot do shows anywhere inside it
        if is_lack_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}"[:300]
        hint = "--prompt TEXT" if prompt is None else "another prompt, or none"
        raise GazeError(f"{folder}, a {type(network).__name__}, says nothing of a picture: {said}", hint) from error
    return captioner


def prepare(captioner: Captioner, pictures: Sequence[Image.Image]) -> dict[str, Tensor]:
    """What the network reads of pictures, and of the prompt for each. Needs no network."""
    processor, prompt = captioner.processor, captioner.prompt
    if prompt is None:
        inputs = getattr(processor, "image_processor", processor)(images=[*pictures], return_tensors="pt")
    elif getattr(processor, "chat_template", None):
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        start = captioner.tokenizer.bos_token
        marks = {"add_special_tokens": False} if start and text.startswith(start) else {}
        inputs = processor(
            images=[[picture] for picture in pictures],
            text=[text] * len(pictures),
            padding=True,
            return_tensors="pt",
            **marks,
        )
    else:
        inputs = processor(images=[*pictures], text=[prompt] * len(pictures), padding=True, return_tensors="pt")
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def captions(
    captioner: Captioner,
    inputs: Mapping[str, Tensor],
    tokens: int,
    beams: int = 1,
    count: int = 1,
    temperature: float = 0.0,
    draws: Sequence[Sequence[np.random.Generator]] = (),
) -> list[list[str]]:
    """`count` captions of each picture, each in one line, without the prompt; equal ones once.

    inputs: of `prepare`. draws: with a temperature, of each picture a generator for each caption. Others: see `write`.
    """
    if temperature:
        written = [
            write(captioner.network, inputs, tokens, temperature=temperature, draws=[row[number] for row in draws])
            for number in range(count)
        ]
    else:
        both = write(captioner.network, inputs, tokens, beams, count)
        written = [both[number::count] for number in range(count)]

    def read(ids: Any) -> list[str]:
        return [text.strip() for text in captioner.tokenizer.batch_decode(ids, skip_special_tokens=True)]

    texts = [read(rows) for rows in written]
    prompts = read(inputs["input_ids"]) if "input_ids" in inputs else [""] * len(texts[0])
    return [
        [*dict.fromkeys(" ".join(text.removeprefix(prompt).split()) for text in row)]
        for row, prompt in zip(zip(*texts, strict=True), prompts, strict=True)
    ]
