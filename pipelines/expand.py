"""A short prompt enriched by a causal language model of transformers: what was asked for stays as it is, weights and
brackets too, and words are added behind it.

    writer = open_writer("storyteller")
    pipe(expand(writer, "a (red:1.3) apple", seed=7), seed=7)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.errors import GazeError
from diffusion.prompts import closed, escape, parse

from .borrowed import device_of, open_borrowed, open_part, write
from .checks import number, whole
from .recall import EXPANDED

NEEDED = "a causal language model, such as GPT-2, Llama or Qwen"
TOKENS = 40  # that are added at most
ASKED = (
    "A picture is to show: {}\nAdd what makes it a better description: details, surroundings, light, style. Answer in "
    "one line with the words to add, separated by commas, and nothing else."
)


class Writer(NamedTuple):
    """A language model, opened."""

    network: Any
    tokenizer: Any


def open_writer(model: str | Path, device: str | None = None, dtype: torch.dtype | None = None) -> Writer:
    """A language model by its folder or id on the hub. device: None takes a GPU if there is one. dtype: None takes the
    stored one. Raises GazeError when it is not there or no causal language model."""
    network, folder = open_borrowed(model, "AutoModelForCausalLM", NEEDED, device_of(device), dtype)
    return Writer(network, open_part("AutoTokenizer", folder))


def expand(writer: Writer, prompt: str, seed: int, tokens: int = TOKENS, temperature: float = 1.0) -> str:
    """The prompt and what the writer adds to it, a function of the arguments alone.

    seed: draws the words; tokens: at most so many are added. temperature: below 1 for likelier words, 0 for the
    likeliest, whatever the seed. A model with a chat template is asked for details; any other goes on writing where the
    prompt ends. A prompt without a word stays as it is.
    Raises GazeError for values that cannot be, and for a prompt that is longer than the model reads.
    """
    tokens = whole("tokens", tokens, 1)
    if number("temperature", temperature) < 0:
        raise GazeError(f"temperature is {temperature}", "0 for the likeliest words, 1 to draw as the model does")
    plain = " ".join(chunk.text for chunk in parse(prompt))
    said = " ".join(plain.encode("utf-8", "replace").decode().split()).rstrip(" ,")  # tokenizers take no surrogates
    if not said:
        return prompt
    inputs = _inputs(writer, said)
    length = inputs["input_ids"].shape[1]
    longest = getattr(writer.network.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and length + tokens > longest:
        raise GazeError(
            f"the prompt takes {length} tokens, and {tokens} more are to be added; the language model reads {longest}",
            "a shorter prompt, or fewer tokens",
        )
    draws = [np.random.default_rng(whole("seed", seed, 0))]
    (row,) = write(writer.network, inputs, tokens, temperature=temperature, draws=draws).tolist()
    text = writer.tokenizer.decode(row[length:], skip_special_tokens=True)
    added = _added(said, text, unfinished=len(row) == length + tokens)
    return f"{closed(prompt).rstrip(' ,')}, {escape(added)}" if added else prompt


def expand_each(
    model: str, pictures: Sequence[dict[str, Any]], tokens: int = TOKENS, temperature: float = 1.0
) -> list[dict[str, Any]]:
    """The settings of pictures with their prompts expanded by their seeds, and in each what the prompt was before."""
    write_once = functools.cache(functools.partial(expand, open_writer(model), tokens=tokens, temperature=temperature))
    noted = {"model": model, "tokens": tokens, "temperature": temperature}
    return [
        {**each, "prompt": write_once(each["prompt"], each["seed"]), EXPANDED: {"prompt": each["prompt"], **noted}}
        for each in pictures
    ]


def _inputs(writer: Writer, said: str) -> dict[str, torch.Tensor]:
    """Of one row."""
    tokenizer = writer.tokenizer
    if getattr(tokenizer, "chat_template", None):
        asked = [{"role": "user", "content": ASKED.format(said)}]
        # A model that thinks aloud first would fill the line with its thoughts.
        options = {"add_generation_prompt": True, "enable_thinking": False}
        read = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True, **options)
    else:
        read = tokenizer(said if said[-1] in ".!?:;" else f"{said},", return_tensors="pt")
    return {"input_ids": read["input_ids"], "attention_mask": torch.ones_like(read["input_ids"])}


def _added(said: str, text: str, unfinished: bool) -> str:
    """The words of a model's first line, without the prompt that some repeat; of a line that was cut off, what comes
    before its last stop, or else its last space."""
    line = next((" ".join(line.split()) for line in text.splitlines() if line.strip()), "")
    if unfinished and len(text.strip().splitlines()) == 1:
        line = next((found[1] for ends in ("[.,;!?] ", " ") if (found := re.match(rf"(.*){ends}", line))), line)
    line = line.strip("\"'“” ")
    # Letters without case may be more of them: "STRASSE" is "Straße".
    line = next((line[end:] for end in range(len(line) + 1) if line[:end].casefold() == said.casefold()), line)
    # The grammar's one word; brackets are escaped.
    return re.sub(r"\bBREAK\b", "break", line.replace("\ufffd", "")).strip(" ,.;:")
