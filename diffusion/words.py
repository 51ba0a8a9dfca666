"""Which tokens of a prompt are which word, for all that speaks of attention in words."""

# Shapes: S tokens of the text.

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

from .errors import GazeError, nearest
from .text import EMPTY, Reading

START, END, PADDING = "<start>", "<end>", "<padding>"


def plain(name: str) -> str:
    """A name as names are compared: as the tokenizer reads it, in lower case and with marks joined to their letters."""
    return unicodedata.normalize("NFC", name).lower()


class Words(NamedTuple):
    """names: the words of a prompt in their order, as often as each stands there, then the special tokens that it has.
    of_S: of each token the number of its name. So every token belongs to exactly one name."""

    names: tuple[str, ...]
    of_S: tuple[int, ...]

    def numbers(self, word: str) -> list[int]:
        """The numbers of a word, wherever it stands; case does not matter. Raises GazeError when it stands nowhere."""
        found = [number for number, name in enumerate(self.names) if plain(name) == plain(word)]
        if not found:
            said = [name for name in self.names if name not in (START, END, PADDING)]
            has = f"whose words are {', '.join(map(repr, dict.fromkeys(said)))}" if said else "which has no words"
            raise GazeError(f"{word!r} is not a word of this prompt, {has}", nearest(word, said or self.names))
        return found

    def tokens(self, *numbers: int) -> list[int]:
        """The places of the tokens that belong to names of these numbers."""
        return [place for place, number in enumerate(self.of_S) if number in numbers]


def words_of(reading: Reading, window: int, chunks: int = 1) -> Words:
    """The words of a prompt as `TextEncoder.encode` lays its tokens out: in chunks of a window, at least `chunks` of
    them, each framed by start and end and filled up. A word that no chunk has room for has no token and no name."""
    rows = [*reading.chunks, *[EMPTY] * (chunks - len(reading.chunks))]
    tokens: list[int | str] = []
    for row in rows:
        tokens += [START, *row.words, END, *[PADDING] * (window - 2 - len(row.words))]
    known: Sequence[int | str] = [*sorted({token for token in tokens if isinstance(token, int)}),
                                  *(name for name in (START, END, PADDING) if name in tokens)]  # fmt: skip
    number = {token: i for i, token in enumerate(known)}
    names = tuple(reading.words[token] if isinstance(token, int) else token for token in known)
    return Words(names, tuple(number[token] for token in tokens))
