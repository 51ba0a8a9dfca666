"""The prompt grammar against a slow reading of its rules, and against whatever text there may be."""

import math
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusion.prompts import DEEPEST, HIGHEST, LOWEST, Chunk, Span, closed, escape, parse
from diffusion.text import MOST_CHUNKS, TextEncoder
from pipelines.shipped import DEFAULT_MODEL

GRAMMAR = st.text(alphabet="()[]:\\ aB1.5-", max_size=40)
PIECES = st.lists(
    st.sampled_from(["(", ")", "[", "]", ":1.3)", ":0)", ": -2 )", ":nan)", "\\", "BREAK", "a", " b,", "é"]),
    max_size=30,
)
ANYTHING = st.one_of(GRAMMAR, PIECES.map("".join), st.text(st.characters(), max_size=60))


def weighed(prompt: str) -> list[tuple[str, float]]:
    """The one chunk of a prompt as (text, weight), rounded."""
    (chunk,) = parse(prompt)
    return [(chunk.text[span.start : span.end], round(span.weight, 4)) for span in chunk.spans]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red apple", [("a red apple", 1.0)]),
        ("a (red) apple", [("a ", 1.0), ("red", 1.1), (" apple", 1.0)]),
        ("a (red:1.3) apple", [("a ", 1.0), ("red", 1.3), (" apple", 1.0)]),
        ("a (red : 1.3 ) apple", [("a ", 1.0), ("red ", 1.3), (" apple", 1.0)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 0.9091)]),
        ("(a (b:2) c:0.5)", [("a ", 0.5), ("b", 1.0), (" c", 0.5)]),
        ("[a (b)]", [("a ", 0.9091), ("b", 1.0)]),
        (r"\(red\) \[x\] \\ \n", [("(red) [x] \\ \\n", 1.0)]),
        ("(never closed", [("never closed", 1.1)]),
        ("never opened) at all]", [("never opened) at all]", 1.0)]),
        ("(a] b)", [("a] b", 1.1)]),
        ("[a:1.5]", [("a:1.5", 0.9091)]),
        ("(red:nan) (red:inf) (red:) (red:1.2.3)", [("red:nan", 1.1), (" ", 1.0), ("red:inf", 1.1), (" ", 1.0),
                                                    ("red:", 1.1), (" ", 1.0), ("red:1.2.3", 1.1)]),
        ("(red:99)", [("red", 4.0)]),
        ("(red:-1)", [("red", 0.0)]),
        ("(red:0)", [("red", 0.0)]),
        ("(red:.5)", [("red", 0.5)]),
        ("flag: Japan", [("flag: Japan", 1.0)]),
        ("UNBREAKABLE BREAKs", [("UNBREAKABLE BREAKs", 1.0)]),
    ],
)  # fmt: skip
def test_the_grammar_by_example(prompt, expected):
    assert weighed(prompt) == expected


def test_break_begins_a_chunk_also_inside_brackets():
    assert parse("a (b BREAK c) d") == [
        Chunk("a b ", (Span(0, 2, 1.0), Span(2, 4, 1.1))),
        Chunk(" c d", (Span(0, 2, 1.1), Span(2, 4, 1.0))),
    ]
    assert [chunk.text for chunk in parse("BREAK")] == ["", ""]


def slowly(prompt: str) -> list[tuple[str, float]]:
    """Each character of the text with its weight: a closing bracket multiplies everything since its opening one."""
    said: list[list] = []
    opened: list[tuple[str, int]] = []
    weight = re.compile(r":\\s{0,8}([+-]?(?:\\d{1,8}\\.?\\d{0,8}|\\.\\d{1,8}))\\s{0,8}\\)".replace("\\\\", "\\"))
    at = 0

    def close(factor: float) -> None:
        _, start = opened.pop()
        for item in said[start:]:
            item[1] *= factor

    while at < len(prompt):
        here = prompt[at]
        explicit = weight.match(prompt, at)
        if here == "\\" and prompt[at + 1 : at + 2] in tuple("()[]\\"):
            said.append([prompt[at + 1], 1.0])
            at += 2
        elif explicit and opened and opened[-1][0] == "(":
            close(min(max(float(explicit[1]), LOWEST), HIGHEST))
            at = explicit.end()
        elif explicit:
            said += [[c, 1.0] for c in explicit[0]]
            at = explicit.end()
        else:
            if here in "([":
                opened.append((here, len(said)))
            elif opened and opened[-1][0] + here in ("()", "[]"):
                close(1.1 if here == ")" else 1 / 1.1)
            else:
                said.append([here, 1.0])
            at += 1
    while opened:
        close(1.1 if opened[-1][0] == "(" else 1 / 1.1)
    return [(c, w) for c, w in said]


@settings(max_examples=500, deadline=None)
@given(ANYTHING.filter(lambda prompt: "BREAK" not in prompt and prompt.count("(") + prompt.count("[") <= DEEPEST))
@example("(a:1.3)(b")
@example("(" * 20 + "a" + ":1.3)" * 8 + "b")
def test_the_grammar_against_a_slow_reading(prompt):
    (chunk,) = parse(prompt)
    expected = slowly(prompt)
    assert chunk.text == "".join(c for c, _ in expected)
    for weight, (_, product) in zip(chunk.weights_at(range(len(chunk.text))), expected, strict=True):
        assert weight == pytest.approx(min(product, HIGHEST), rel=1e-9, abs=1e-12)


@settings(max_examples=500, deadline=None)
@given(ANYTHING)
@example("(" * 5000)
@example("[" * 5000 + "a")
@example("(a:1e308)" * 50)
def test_any_text_is_a_prompt(prompt):
    chunks = parse(prompt)
    assert chunks
    for chunk in chunks:
        ends = [0, *(span.end for span in chunk.spans)]
        assert [span.start for span in chunk.spans] == ends[:-1]
        assert ends[-1] == len(chunk.text)
        assert all(math.isfinite(span.weight) and LOWEST <= span.weight <= HIGHEST for span in chunk.spans)


@settings(max_examples=500, deadline=None)
@given(ANYTHING.filter(lambda text: "BREAK" not in text))
def test_an_escaped_text_says_itself(text):
    assert parse(escape(text)) == [Chunk(text, (Span(0, len(text), 1.0),) if text else ())]


@given(ANYTHING)
@example("(a:1.3")
@example("((a [b\\")
@example("(a) [b)")
def test_closed_brackets_mean_the_same_and_what_follows_is_outside(prompt):
    assert parse(closed(prompt)) == parse(prompt)
    *before, last = parse(prompt)
    *same, longer = parse(f"{closed(prompt)}, {escape('(x:2) ]')}")
    assert same == before
    assert longer.text == f"{last.text}, (x:2) ]"
    assert longer.weights_at(range(len(longer.text))) == [
        *last.weights_at(range(len(last.text))),
        *[1.0] * len(", (x:2) ]"),
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"), [("a [b] (c", "a [b] (c:1.1)"), ("[a (b", "[a (b:1.1)]"), ("(a:1.3)", "(a:1.3)")]
)
def test_only_what_is_open_is_closed(prompt, expected):
    assert closed(prompt) == expected


def test_however_long_it_is_read_in_bounded_time_and_the_rest_is_named():
    text = TextEncoder.from_pretrained(DEFAULT_MODEL / "text_encoder", DEFAULT_MODEL / "tokenizer")
    reading = text.read("cat " * 25_000)
    read = sum(len(chunk.ids) for chunk in reading.chunks)
    assert (len(reading.chunks), read) == (MOST_CHUNKS, MOST_CHUNKS * (text.window - 2))
    assert reading.dropped.split() == ["cat"] * (25_000 - read)
    begin = time.process_time()
    text.read("\U0001f469\u200d\U0001f680" * 33_000)
    assert time.process_time() - begin < 0.05
