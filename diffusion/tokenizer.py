"""CLIP's tokenizer (Radford et al. 2021; byte-pair encoding: Sennrich et al. 2016) <-> a `tokenizer/` folder."""

# Shapes: B prompts, S tokens of the text.

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from torch import Tensor

from .errors import GazeError
from .files import read_json, write_json

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

Vocab = Mapping[str, int]
Merges = Sequence[tuple[str, str]]


def blank(vocab: Vocab, merges: Merges, unknown: str = END) -> Backend:
    """CLIP's way from a text to pieces of it, with these words; without special tokens."""
    # Copies, because a vocabulary that is no dict is taken for the name of a file.
    model = BPE(vocab=dict(vocab), merges=list(merges), end_of_word_suffix=WORD_END, unk_token=unknown)
    model.continuing_subword_prefix = ""
    backend = Backend(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return backend


class Tokenizer:
    """Prompts -> token ids, as transformers' CLIPTokenizer gives them.

    roles: the tokens that start, end and fill a prompt (bos_token, eos_token, pad_token) and stand for the unknown.
    added: tokens that are found in a text before it is split; None: those of the roles.
    window: tokens of a prompt, start and end included; None: as many as the text encoder has positions.
    Raises GazeError when words and merges do not fit each other.
    """

    def __init__(
        self,
        vocab: Vocab,
        merges: Merges,
        window: int | None = None,
        roles: Mapping[str, str] = ROLES,
        added: Iterable[AddedToken] | None = None,
    ) -> None:
        try:
            self.backend = blank(vocab, merges, roles["unk_token"])
        except Exception as error:  # the class that tokenizers raises
            raise GazeError(f"the words and merges of a tokenizer do not fit: {error}", "copy them again") from None
        self.backend.add_tokens([_added(token) for token in roles.values()] if added is None else [*added])
        self.roles = dict(roles)
        self.window = window
        number: Any = self.backend.token_to_id  # never None here: add_tokens has made sure of them
        self.start, self.end, self.pad = (number(roles[role]) for role in ("bos_token", "eos_token", "pad_token"))
        # For other readers of tokenizer.json; `tokens` has its own way, which keeps within the window.
        self.backend.post_processor = processors.RobertaProcessing(
            (roles["eos_token"], self.end), (roles["bos_token"], self.start), trim_offsets=False, add_prefix_space=False
        )

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def tokens(self, prompts: Sequence[str], window: int) -> Tensor:
        """Token ids BS: start, the prompt as far as it fits, end, then padding up to the window S."""
        return torch.tensor([self.framed(self.split(prompt)[0][: window - 2], window) for prompt in prompts])

    def framed(self, ids: Sequence[int], window: int) -> list[int]:
        """Start, up to window - 2 ids, end, then padding up to the window."""
        row = [self.start, *ids, self.end]
        return row + [self.pad] * (window - len(row))

    def padded_with(self, index: int) -> Tokenizer:
        """The same words, with this token id as the one that fills prompts; other added tokens are left out."""
        words = json.loads(self.backend.to_str())["model"]
        merges = [(left, right) for left, right in (_pair(pair) for pair in words["merges"])]
        return Tokenizer(
            words["vocab"], merges, self.window, {**self.roles, "pad_token": str(self.backend.id_to_token(index))}
        )

    def split(self, text: str) -> tuple[list[int], list[int]]:
        """The ids of a text without start and end, and where in the text the characters of each begin."""
        # A shell makes surrogates of bytes that are not UTF-8, and tokenizers refuses them: "?" instead.
        encoding = self.backend.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
        return encoding.ids, [begin for begin, _ in encoding.offsets]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Tokenizer:
        """Reads a `tokenizer/` folder: tokenizer.json, or else vocab.json and merges.txt; GazeError when broken.

        Of tokenizer.json only words, merges and added tokens count, as for transformers' CLIPTokenizer.
        """
        folder = Path(folder)
        whole, config = _read_if_there(folder / "tokenizer.json"), _read_if_there(folder / "tokenizer_config.json")
        try:
            if whole:
                vocab, pairs = whole["model"]["vocab"], whole["model"]["merges"]
            else:
                vocab, pairs = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
            merges = [(left, right) for left, right in (_pair(pair) for pair in pairs)]
            roles, added = _special(folder, whole, config)
            length = config.get("model_max_length")
            window = None if length is None else int(length)
            return cls(vocab, merges, window, roles, added)
        except GazeError as error:
            raise GazeError(f"{folder}: {error.problem}", error.hint) from None
        except Exception as error:  # tokenizers raises this class; a file of another shape raises any
            raise GazeError(f"{folder} cannot be opened as a CLIP tokenizer: {error}", "copy it again") from None

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a `tokenizer/` folder, with vocab.json and merges.txt for older readers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        self.backend.model.save(str(folder))
        length = {} if self.window is None else {"model_max_length": self.window}
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **self.roles, **length})
        write_json(folder / "special_tokens_map.json", self.roles)


def _pair(merge: str | Sequence[str]) -> Sequence[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special(
    folder: Path, whole: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[dict[str, str], list[AddedToken]]:
    """Which token plays which role, and the tokens to find before splitting.

    Newer folders say both in tokenizer_config.json, older ones in up to four files.
    """
    stated, listed = {**ROLES, **config}, config.get("added_tokens_decoder")
    if listed is None:
        stated |= _read_if_there(folder / "special_tokens_map.json")
        legacy = _read_if_there(folder / "added_tokens.json")
        listed = {index: {"content": token, "special": False} for token, index in legacy.items()}
        listed |= {token["id"]: token for token in whole.get("added_tokens", [])}
    by_id = {int(index): _added(token) for index, token in listed.items()}
    added = [by_id[index] for index in sorted(by_id)]
    known = {token.content for token in added}
    named = {role: _added(stated[role]) for role in ROLES}
    added += [token for token in named.values() if token.content not in known]
    return {role: token.content for role, token in named.items()}, added


def _added(token: str | Mapping[str, Any]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    options = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in token}
    return AddedToken(token["content"], **{"special": True} | options)
