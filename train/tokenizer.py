"""A CLIP tokenizer learned from captions: byte-pair encoding (Sennrich et al. 2016) of bytes, so all text is known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from tokenizers import pre_tokenizers, trainers

from diffusion.tokenizer import END, START, WORD_END, Tokenizer, blank


def learn_tokenizer(captions: Iterable[str], vocab_size: int, window: int) -> Tokenizer:
    """The same captions give the same tokenizer. window: tokens of a prompt, start and end included.

    vocab_size: tokens at most, but for the 514 that every tokenizer has: each byte inside and at the end of a word,
    start and end.
    """
    backend = blank({}, [])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Left to itself the trainer numbers the ends of words in the order of a hash table, another one in each process;
    # as special tokens they are numbered first, in this order, and those that no caption has are there too.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END, *(byte + WORD_END for byte in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    learned = json.loads(backend.to_str())["model"]
    return Tokenizer(learned["vocab"], [tuple(pair) for pair in learned["merges"]], window)


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of each token's number and the merges: weights of a text encoder mean nothing under another one."""
    model = json.loads(tokenizer.backend.to_str())["model"]
    return hashlib.sha256(json.dumps([model["vocab"], model["merges"]], sort_keys=True).encode()).hexdigest()
