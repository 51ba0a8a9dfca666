"""The tokenizer learned from captions, and the text encoder around it."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.text import TextEncoder
from diffusion.tokenizer import END, START, Tokenizer
from train.tokenizer import fingerprint, learn_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CAPTIONS = ["a red square", "a green circle", "Red circles, green squares!", "the red dog's square", "café"] * 3
STRANGE = ["😀🏽‍♂️", "ÉÀß ñ", "日本語", "a\x00b", "\u200d", "½ ﬁ Ⅷ", "🇯🇵", "don't", "", "  \n\t ", "x" * 500]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learn_tokenizer(CAPTIONS, vocab_size=600, window=12)


def text_encoder(tokenizer: Tokenizer) -> TextEncoder:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=12, **sizes)
    return TextEncoder(CLIPText(config).initialize().eval(), tokenizer)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.backend.encode(text, add_special_tokens=False).tokens


def test_it_learns_the_words_of_the_captions(tokenizer):
    assert words(tokenizer, "Red SQUARE") == ["red</w>", "square</w>"]
    assert len(tokenizer) <= 600
    number = tokenizer.backend.token_to_id
    assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (number(START), number(END), number(END))
    assert tokenizer.window == 12


@pytest.mark.parametrize("text", STRANGE)
def test_no_text_is_unknown(tokenizer, text):
    found = words(tokenizer, text)
    assert END not in found
    if text.isascii() and text.isprintable():
        assert "".join(found).replace("</w>", "") == text.replace(" ", "")


def test_every_byte_has_a_token_inside_and_at_the_end_of_a_word(tokenizer):
    for byte in range(256):
        letter = bytes([byte]).decode("latin-1")
        assert END not in words(tokenizer, f"q{letter}q {letter}")


def test_the_same_captions_give_the_same_tokenizer_in_any_process():
    """The trainer's hash tables are seeded anew each time they are made."""
    program = "from tests.train.test_tokenizer import *; print(fingerprint(learn_tokenizer(CAPTIONS, 600, 12)))"
    other = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
    ).stdout.strip()
    assert {fingerprint(learn_tokenizer(CAPTIONS, 600, 12)) for _ in range(5)} == {other}
    assert fingerprint(learn_tokenizer(CAPTIONS[1:2], 600, 12)) != other


def test_transformers_and_our_loader_read_it_back(tokenizer, tmp_path):
    encoder = text_encoder(tokenizer)
    encoder.save_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    plain = CLIPTokenizer(str(tmp_path / "tokenizer" / "vocab.json"), str(tmp_path / "tokenizer" / "merges.txt"))
    ours = TextEncoder.from_pretrained(tmp_path / "text_encoder", tmp_path / "tokenizer")
    texts = [*CAPTIONS, *STRANGE]
    ids = encoder.tokens(texts)
    assert ours.tokens(texts).equal(ids)
    for library in (theirs, plain):
        options = {"padding": "max_length", "max_length": 12, "truncation": True, "return_tensors": "pt"}
        assert library(texts, **options).input_ids.equal(ids)
    assert theirs.model_max_length == ours.window == 12
    assert ours.width == 8
    assert ours.model(ids).equal(encoder.model(ids))


def test_tokens_end_at_the_window(tokenizer):
    encoder = text_encoder(tokenizer)  # ten words fit
    kept = encoder.tokens(["red " * 10 + "square"])
    assert kept.equal(encoder.tokens(["red " * 10]))


def test_half_a_surrogate_is_read_as_a_question_mark(tokenizer):
    encoder = text_encoder(tokenizer)
    assert encoder.tokens(["red \udcff square"]).equal(encoder.tokens(["red ? square"]))
    assert encoder.read("red \udcff square").chunks == encoder.read("red ? square").chunks
