"""What the U-Net is told of each sample beside its noise level: the caption and, in SDXL, the picture's sizes."""

# Shapes: B batch, S tokens of the text, E width of the text embedding, P width of the pooled vector.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.condition import Condition, blank
from diffusion.pretrained import Model
from diffusion.text import TextEncoder
from diffusion.unet import UNet


def tell(model: Model, samples: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """The samples' captions as `read` takes them, `tokens`, and the rest as `condition` does.

    A dropped caption is what sampling takes for no negative prompt: the empty prompt, or zeros where the model has
    these (SDXL); sizes are told all the same, as when sampling.
    """
    captions = [sample.caption for sample in samples]
    told: dict[str, Any] = {"tokens": [text.tokens(captions).to(device) for text in model.texts.values()]}
    if model.text_2 is not None:
        told["sizes_B6"] = torch.tensor([(*s.original, *s.crop, *s.size) for s in samples], device=device)
    if model.zeros:
        told["blank_B"] = torch.tensor([sample.dropped for sample in samples], device=device)
    if model.mask_padding:
        told["seen_BS"] = model.text.seen(told["tokens"][0])
    return told


def read(texts: Sequence[TextEncoder], tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """tokens_BS of each text encoder -> context_BSE and the last one's pooled vector BP."""
    each = [text.states(tokens_BS) for text, tokens_BS in zip(texts, tokens, strict=True)]
    return torch.cat([states_BSE for states_BSE, _ in each], dim=-1), each[-1][1]


def condition(
    unet: UNet,
    states: tuple[Tensor, Tensor | None],
    sizes_B6: Tensor | None = None,
    blank_B: Tensor | None = None,
    seen_BS: Tensor | None = None,
) -> Condition:
    """What `read` gave, as the U-Net takes it. sizes_B6: see `UNet.vector`. blank_B: rows of zeros. seen_BS: the
    condition's weights, False for what is hidden."""
    text = Condition(*states) if blank_B is None else blank(Condition(*states), blank_B)
    vector_BV = unet.vector(text.vector_BV, () if sizes_B6 is None else sizes_B6)
    return Condition(text.context_BSE, vector_BV, seen_BS)
