"""Prompts -> Condition, over transformers' CLIP text encoder (Radford et al. 2021) and its tokenizer."""

# Shapes: B prompts, S tokens of the text, E width of the text embedding.

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from .condition import Condition
from .errors import GazeError
from .pretrained import read_json, weight_files


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class TextEncoder:
    """model: CLIPTextModel; tokenizer: CLIPTokenizer, whose model_max_length is the window S."""

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.window = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    @classmethod
    def from_pretrained(cls, text_encoder: str | Path, tokenizer: str | Path) -> TextEncoder:
        """Reads diffusers' text_encoder/ and tokenizer/ folders, weights as float32; GazeError when broken."""
        folder = Path(text_encoder)
        read_json(folder / "config.json")
        variant = "fp16" if ".fp16" in weight_files(folder, "model")[0].name else None
        try:
            with _no_progress_bar():
                model = CLIPTextModel.from_pretrained(
                    folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, variant=variant
                )
        except (OSError, ValueError, RuntimeError) as error:
            raise GazeError(f"{folder} cannot be opened as a CLIP text encoder: {error}", "copy it again") from None
        try:
            words = CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
        except (OSError, ValueError, TypeError) as error:
            raise GazeError(f"{tokenizer} cannot be opened as a CLIP tokenizer: {error}", "copy it again") from None
        return cls(model.eval().requires_grad_(False), words)

    def save_pretrained(
        self, text_encoder: str | Path, tokenizer: str | Path, dtype: torch.dtype = torch.float32
    ) -> None:
        state = {name: value.detach().to("cpu", dtype) for name, value in self.model.state_dict().items()}
        with _no_progress_bar():
            self.model.save_pretrained(text_encoder, state_dict=state)
        self.tokenizer.save_pretrained(str(tokenizer))
        self.tokenizer.backend_tokenizer.model.save(str(tokenizer))  # vocab.json and merges.txt, for older readers

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids BS, cut and padded to the window as diffusers does."""
        texts = [readable(prompt) for prompt in prompts]
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=self.window, truncation=True, return_tensors="pt"
        )
        return encoded.input_ids

    def encode_tokens(self, tokens_BS: Tensor) -> Tensor:
        """Token ids -> states BSE of the last layer, normalised."""
        return self.model(tokens_BS).last_hidden_state

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Prompts -> their condition, one row each."""
        return Condition(self.encode_tokens(self.tokens(prompts).to(self.model.device)))

    def dropped(self, prompt: str) -> str:
        """The end of the prompt that does not fit the window, "" if all of it does."""
        level = logging.getLogger("transformers.tokenization_utils_base")
        previous = level.level
        level.setLevel(logging.ERROR)  # its "longer than the maximum" warning is what this method answers
        try:
            encoded = self.tokenizer(readable(prompt), add_special_tokens=False, return_offsets_mapping=True)
        finally:
            level.setLevel(previous)
        kept = self.window - 2  # start and end tokens take two places
        offsets = encoded.offset_mapping
        return prompt[offsets[kept][0] :].strip() if len(offsets) > kept else ""


def readable(prompt: str) -> str:
    """The prompt with "?" for each surrogate: a shell makes them of bytes that are not UTF-8; tokenizers refuse."""
    return prompt.encode("utf-8", "replace").decode()
