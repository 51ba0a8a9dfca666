"""Which words of one prompt stand for which of another, and what that makes of their tokens."""

# Shapes: S tokens of the text.

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import GazeError
from .words import END, PADDING, START, Words, plain


class Pair(NamedTuple):
    """Words of the source and those of the target in their place; one of the two may be empty."""

    source: tuple[str, ...]
    target: tuple[str, ...]

    def __str__(self) -> str:
        source, target = " ".join(self.source), " ".join(self.target)
        if not source or not target:
            return f"- {source}" if source else f"+ {target}"
        return source if source == target else f"{source} -> {target}"


class Alignment(NamedTuple):
    """pairs: all words of both prompts, in order. given_SS: how much of the attention that a token of the source (row)
    has goes to each token of the target (column); a row's sum is 1, or 0 where a word is left out."""

    pairs: list[Pair]
    given_SS: Tensor

    @property
    def added_S(self) -> Tensor:
        """True for tokens of the target that have none in the source."""
        return self.given_SS.sum(0) == 0


def align(source: Words, target: Words) -> Alignment:
    """Pairs the words by the longest runs that both prompts have; case does not matter, nor does the number of a word's
    tokens. Words replaced by as many others are paired one by one, else all with all; special tokens with their kind.

    Raises GazeError when the prompts have no word in common.
    """
    numbers = [
        [i for i, name in enumerate(words.names) if name not in (START, END, PADDING)] for words in (source, target)
    ]
    here, there = numbers
    pairs = [*_pairs([plain(source.names[i]) for i in here], [plain(target.names[i]) for i in there])]
    said = [Pair(tuple(source.names[here[i]] for i in a), tuple(target.names[there[j]] for j in b)) for a, b in pairs]
    if not any(plain(source.names[here[i]]) == plain(target.names[there[j]]) for a, b in pairs for i in a for j in b):
        raise GazeError(f"the prompts have no word in common: {', '.join(map(str, said)) or 'they have no words'}",
                        "prompts that differ in some words only")  # fmt: skip
    given_SS = torch.zeros(len(source.of_S), len(target.of_S))
    both = [([here[i] for i in a], [there[j] for j in b]) for a, b in pairs]
    both += [([source.names.index(name)], [target.names.index(name)])
             for name in (START, END, PADDING) if name in source.names and name in target.names]  # fmt: skip
    for a, b in both:
        rows, columns = torch.tensor(source.tokens(*a)), torch.tensor(target.tokens(*b))
        if len(rows) and len(columns):
            given_SS[rows[:, None], columns] = shared(len(rows), len(columns))
    return Alignment(said, given_SS)


def shared(count: int, other: int) -> Tensor:
    """[count, other]: what part of each of `count` equal pieces of a line lies in each of its `other` equal pieces. The
    sum of a row is 1; of as many it is the identity."""
    i, j = torch.arange(count)[:, None] * other, torch.arange(other) * count
    return (torch.minimum(i + other, j + count) - torch.maximum(i, j)).clamp(min=0) / other


def _pairs(source: list[str], target: list[str]) -> Iterator[tuple[range, range]]:
    for _, a, b, c, d in SequenceMatcher(None, source, target, autojunk=False).get_opcodes():
        if b - a == d - c:
            yield from ((range(i, i + 1), range(j, j + 1)) for i, j in zip(range(a, b), range(c, d), strict=True))
        else:
            yield range(a, b), range(c, d)
