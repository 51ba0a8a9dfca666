"""Which tokens are which word: every token belongs to one, and the words are those of the prompt."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.errors import GazeError
from diffusion.prompts import parse
from diffusion.text import MOST_CHUNKS
from diffusion.words import END, PADDING, START, words_of
from pipelines import TextToImage

SPECIAL = (START, END, PADDING)


@pytest.fixture(scope="module")
def text():
    return TextToImage.from_pretrained().model.text


def said(words):
    return [name for name in words.names if name not in SPECIAL]


def test_pieces_of_a_word_are_one(text):
    reading = text.read("a (snowman:1.3), wearing pince-nez")
    words = words_of(reading, text.window)
    assert said(words) == ["a", "snowman", ",", "wearing", "pince-nez"]
    assert words.names[5:] == SPECIAL
    assert len(reading.chunks[0].ids) > 5
    number = words.names.index("pince-nez")
    assert words.of_S.count(number) > 1
    assert words.of_S[0] == words.names.index(START)
    assert words.of_S[len(reading.chunks[0].ids) + 1] == words.names.index(END)


@pytest.mark.parametrize(
    "word", ["नमस्ते", "สวัสดี", "cafe\u0301", "👩🏽‍🚀", "👨‍👩‍👧", "❤️", "🇫🇷", "naïve", "漢字"]
)  # the é is e and a mark
def test_marks_and_joined_parts_belong_to_their_word(text, word):
    assert text.read(f"a {word} {word}, {word}").words == ("a", word, word, ",", word)


def test_every_character_with_a_token_has_a_word(text):
    """What is white space to the one and not to the other would be a token of no word."""
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    for prompt in (*spaces, *(f"red BREAK {space}" for space in spaces)):
        reading = text.read(prompt)
        numbers = [number for chunk in reading.chunks for number in chunk.words]
        assert set(numbers) == set(range(len(reading.words))), repr(prompt)


PARTS = ["red", "Heart", "(big:1.5)", "[old]", "BREAK", "don't", ",", "漢字", "🧑‍🚀", "<end>", "\n"]
prompts = st.text(max_size=80) | st.lists(st.sampled_from(PARTS), max_size=40).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(prompt=prompts, chunks=st.integers(1, 3))
def test_every_token_belongs_to_one_word(text, prompt, chunks):
    reading = text.read(prompt)
    words = words_of(reading, text.window, chunks)
    count = max(chunks, len(reading.chunks))
    assert len(words.of_S) == count * text.window
    assert set(words.of_S) == set(range(len(words.names)))
    assert [words.of_S.count(words.names.index(special)) for special in (START, END)] == [count, count]
    taken = [words.of_S[i : i + text.window] for i in range(0, len(words.of_S), text.window)]
    numbers = [number for row in taken for number in row if words.names[number] not in SPECIAL]
    assert numbers == sorted(numbers)  # in the order of the prompt
    assert len(numbers) == sum(len(chunk.ids) for chunk in reading.chunks)


@settings(max_examples=150, deadline=None)
@given(prompt=prompts)
def test_words_joined_are_the_prompt(text, prompt):
    reading = text.read(prompt)
    plain = " ".join(part.text for part in parse(prompt))
    if reading.dropped or len(reading.chunks) == MOST_CHUNKS:
        return
    assert re.sub(r"\s", "", "".join(reading.words)) == re.sub(r"\s", "", plain)
    kept = iter(reading.words)  # those without a token are left out
    assert all(name in kept for name in said(words_of(reading, text.window)))


def test_a_word_is_found_wherever_it_stands(text):
    words = words_of(text.read("Red fish, red boat"), text.window)
    assert words.numbers("RED") == [0, 3]
    assert words.numbers(PADDING) == [len(words.names) - 1]
    accented = words_of(text.read("a cafe\u0301, a caf\u00e9"), text.window)  # the first é is e and a mark
    assert accented.numbers("Caf\u00e9") == accented.numbers("cafe\u0301") == [1, 4]


def test_a_word_that_is_not_there(text):
    words = words_of(text.read("a red red heart"), text.window)
    with pytest.raises(GazeError) as caught:
        words.numbers("hart")
    assert caught.value.problem == "'hart' is not a word of this prompt, whose words are 'a', 'red', 'heart'"
    assert caught.value.hint.startswith("did you mean 'heart'?")
    with pytest.raises(GazeError, match="'hart' is not a word of this prompt, which has no words"):
        words_of(text.read(""), text.window).numbers("hart")
