"""A CLIP tokenizer learned from captions: byte-pair encoding (Sennrich et al. 2016) over bytes, so no text is unknown."""

from __future__ import annotations

from collections.abc import Iterable

import json

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


def learn_tokenizer(captions: Iterable[str], vocab_size: int, window: int) -> CLIPTokenizer:
    """The same captions give the same tokenizer. window: tokens of a prompt, start and end included."""
    blank = CLIPTokenizer().backend_tokenizer  # CLIP's way of splitting and lowering, no words yet
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END],
        initial_alphabet=alphabet,
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    blank.train_from_iterator(captions, trainer)
    learned = json.loads(blank.to_str())["model"]
    vocab = dict(learned["vocab"])
    for byte in alphabet:  # the trainer leaves out the bytes that end no word of the captions
        vocab.setdefault(byte + WORD_END, len(vocab))
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=window, unk_token=END)
