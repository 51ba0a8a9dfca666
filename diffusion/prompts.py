"""The weighting grammar of prompts, as the AUTOMATIC1111 web UI has it.

    (word)      1.1 times the weight        (word:1.3)   1.3 times the weight
    [word]      the weight divided by 1.1   \\( \\) \\[ \\] \\\\   the characters themselves
    BREAK       the rest begins a new chunk

Brackets nest and multiply; one that is never closed reaches to the end, one that was never opened is a character.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

STRONGER, WEAKER = 1.1, 1 / 1.1
LOWEST, HIGHEST = 0.0, 4.0  # of a weight, alone and multiplied
DEEPEST = 32  # brackets further inside are read, but weigh nothing

_CLOSING = {"(": ")", "[": "]"}
_ESCAPED = {"\\(", "\\)", "\\[", "\\]", "\\\\"}
_WEIGHT = r":\s{0,8}[+-]?(?:\d{1,8}\.?\d{0,8}|\.\d{1,8})\s{0,8}\)"
# Each alternative looks ahead a bounded way, so the pass is linear in the prompt. The last but one is a run of text.
_PIECES = re.compile(
    rf"\\[()\[\]\\]|\bBREAK\b|{_WEIGHT}|[()\[\]]|(?:[^\\()\[\]:B]|:(?!{_WEIGHT[1:]})|B(?!REAK\b))+|.", re.S
)


class Span(NamedTuple):
    """Characters start to end of a text, and what they weigh."""

    start: int
    end: int
    weight: float


class Chunk(NamedTuple):
    """A text without its grammar; the spans cover it from its start to its end, in order."""

    text: str
    spans: tuple[Span, ...]

    def weights_at(self, positions: Iterable[int]) -> list[float]:
        """The weight of the character at each of some ascending positions in the text."""
        spans = iter(self.spans)
        span = Span(0, 0, 1.0)
        weights = []
        for position in positions:
            while span.end <= position:
                span = next(spans)
            weights.append(span.weight)
        return weights


def escape(text: str) -> str:
    """A prompt that says the text as it stands, brackets and all. The word BREAK is still one."""
    return re.sub(r"[()\[\]\\]", r"\\\g<0>", text)


def closed(prompt: str) -> str:
    """The prompt with every bracket closed, which changes nothing that it means: what is written behind it is outside
    of them."""
    pieces = _PIECES.findall(prompt)
    _, waiting = _factors(pieces)
    if pieces and pieces[-1] == "\\":  # it stands for itself, but not before a bracket
        pieces.append("\\")
    # Said with its weight, because a number at the prompt's end would become one before a bracket alone.
    ends = [f":{STRONGER})" if pieces[number] == "(" else "]" for number in reversed(waiting)]
    return "".join([*pieces, *ends])


def parse(prompt: str) -> list[Chunk]:
    """The chunks of a prompt, at least one: its text parted at BREAK, and the weight of each part of it.

    Any text is a prompt; what is not grammar stands for itself. Weights are clamped to 0 to 4. Time is linear in
    the length.
    """
    pieces = _PIECES.findall(prompt)
    factors, _ = _factors(pieces)
    chunks: list[Chunk] = []
    text: list[str] = []
    spans: list[Span] = []
    length, weight, products = 0, 1.0, [1.0]
    for number, piece in enumerate(pieces):
        if number in factors:
            factor = factors[number]
            if factor is None:  # the bracket ends here
                products.pop()
            else:
                products.append(products[-1] * (factor if len(products) <= DEEPEST else 1.0))
            weight = min(products[-1], HIGHEST)
        elif piece == "BREAK":
            chunks.append(Chunk("".join(text), tuple(spans)))
            text, spans, length = [], [], 0
        else:
            said = piece[1] if piece in _ESCAPED else piece
            start = spans.pop().start if spans and spans[-1].weight == weight else length
            length += len(said)
            text.append(said)
            spans.append(Span(start, length, weight))
    chunks.append(Chunk("".join(text), tuple(spans)))
    return chunks


def _factors(pieces: list[str]) -> tuple[dict[int, float | None], list[int]]:
    """By its place among the pieces: what each opening bracket multiplies the weight by, and None for each closing
    one. A closing one that nothing opened is not among them. And the places of those that nothing closes."""
    factors: dict[int, float | None] = {}
    waiting: list[int] = []  # opened and not yet closed
    for number, piece in enumerate(pieces):
        kind = piece[0]
        if piece == "(" or piece == "[":
            factors[number] = STRONGER if piece == "(" else WEAKER
            waiting.append(number)
        elif waiting and (kind == ")" or kind == "]" or kind == ":") and piece[-1] == _CLOSING[pieces[waiting[-1]]]:
            opened = waiting.pop()
            factors[number] = None
            if kind == ":":
                factors[opened] = min(max(float(piece[1:-1]), LOWEST), HIGHEST)
    return factors, waiting
