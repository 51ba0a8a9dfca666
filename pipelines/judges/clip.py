"""How well picture and prompt agree, by a network that embeds both: CLIPScore, or SigLIP's own probability.

Shapes: B pictures, as many texts; P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from diffusion.errors import GazeError

from .models import open_judge
from .verdict import Judge, Verdict

NEEDED = "a model that embeds texts and pictures, such as a CLIP or a SigLIP"
WEIGHT = 2.5  # w of CLIPScore
PREFIX = "A photo depicts "  # before each caption, as CLIPScore was published


def clip_judge(name: str, prefix: str | None = None, dtype: str = "float32") -> tuple[Judge, dict[str, Any]]:
    """A judge, and the settings that its scores belong to.

    A network trained with a softmax (CLIP, AltCLIP, ...) gives CLIP-S = 2.5 * max(cos, 0) of the embeddings of
    the picture and of "A photo depicts " + prompt (Hessel et al. 2021, section 3). One with a bias beside its scale was
    trained with a sigmoid (SigLIP, Zhai et al. 2023, algorithm 1), and gives the probability that the two belong
    together, sigmoid(scale * cos + bias), of the prompt as it is. A verdict also tells the cosine, and whether the
    prompt was cut because it is longer than the network can read.

    name: a folder or an id on the hub. prefix: another text before each prompt. dtype: of the weights.
    Raises GazeError when it cannot be opened, or embeds no texts and pictures.
    """
    network, prepare = open_embedder(name, "--judge", dtype)
    bias = getattr(network, "logit_bias", None)
    before = prefix if prefix is not None else PREFIX if bias is None else ""
    longest = longest_text(network, prepare)

    @torch.inference_mode()
    def judge(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Verdict]:
        texts = [before + prompt for prompt in prompts]
        found = network(**prepared(network, prepare, texts, images=[*images]))
        image_BP, text_BP = (F.normalize(each.double(), dim=-1) for each in (found.image_embeds, found.text_embeds))
        cosine_B = (image_BP * text_BP).sum(-1)
        if bias is None:
            score_B = WEIGHT * cosine_B.clamp(min=0)
        else:
            score_B = torch.sigmoid(network.logit_scale.double().exp() * cosine_B + bias.double())
        lengths = [len(ids) for ids in prepare.tokenizer(texts).input_ids]
        return [
            Verdict(score, {"cosine": cosine, "cut": length > longest})
            for score, cosine, length in zip(score_B.tolist(), cosine_B.tolist(), lengths, strict=True)
        ]

    formula = f"{WEIGHT} * max(cosine, 0)" if bias is None else "sigmoid(scale * cosine + bias)"
    return judge, {"judge": name, "formula": formula, "prefix": before, "judge_dtype": dtype}


def open_embedder(name: str, option: str, dtype: str = "float32") -> tuple[Any, Any]:
    """A network that embeds texts and pictures, and its processor. Raises GazeError, whose hint names the option, when
    it is another, or cannot be opened."""
    network, prepare = open_judge(name, NEEDED, dtype=dtype)
    if not (hasattr(network, "get_text_features") and hasattr(network, "get_image_features")):
        raise GazeError(f"{name} is {type(network).__name__}, and {NEEDED} is needed", f"another model with {option}")
    return network, prepare


def longest_text(network: Any, prepare: Any) -> int:
    """How many tokens of a text the network reads; not all tokenizers know it."""
    return min(prepare.tokenizer.model_max_length, network.config.text_config.max_position_embeddings)


def prepared(network: Any, prepare: Any, texts: Sequence[str], **images: Any) -> Any:
    """The network's inputs of texts, and of images where they are given, on its device."""
    if getattr(network, "logit_bias", None) is not None:
        texts = [text.lower() for text in texts]  # as all SigLIPs were trained; the tokenizers of some do not do it
    return prepare(
        text=[*texts],
        padding="max_length",  # SigLIP was trained so; where padding is masked it makes no difference
        truncation=True,
        max_length=longest_text(network, prepare),
        return_tensors="pt",
        **images,
    ).to(network.device, network.dtype)
