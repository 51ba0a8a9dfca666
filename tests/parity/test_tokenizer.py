"""The tokenizer gives the ids of transformers' CLIPTokenizer, whatever the folder was written by."""

import json

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers
from transformers import CLIPTokenizer

from diffusion.errors import GazeError
from diffusion.tokenizer import END, START, Tokenizer
from tests import small_pipeline

WINDOW = 16
MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "o n", "! !</w>", "Ã ©</w>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, *(byte + "</w>" for byte in BYTES), *(merge.replace(" ", "") for merge in MERGES), START, END]
VOCAB = {token: i for i, token in enumerate(TOKENS)}


def token(content, **options):
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | options


# special_tokens_map.json and tokenizer_config.json as in the published folders of Stable Diffusion.
NAMED = {"bos_token": token(START), "eos_token": token(END), "unk_token": token(END)}
PUBLISHED_CONFIG = {
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": WINDOW,
    "name_or_path": "openai/clip-vit-large-patch14",
    "pad_token": END,
    "tokenizer_class": "CLIPTokenizer",
    **{role: {"__type": "AddedToken", **options} for role, options in NAMED.items()},
}


def write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def words(folder):
    """The least that a folder can hold."""
    write(folder, vocab=VOCAB)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")


def words_and_window(folder):
    words(folder)
    write(folder, tokenizer_config={"model_max_length": WINDOW})


def published_1(folder):
    words(folder)
    write(folder, special_tokens_map={**NAMED, "pad_token": END}, tokenizer_config=PUBLISHED_CONFIG)


def published_2(folder):
    """Pads with "!", which then is found in prompts too."""
    words(folder)
    write(folder, special_tokens_map={**NAMED, "pad_token": "!"}, tokenizer_config=PUBLISHED_CONFIG)


def theirs_new():
    return CLIPTokenizer(vocab=VOCAB, merges=[tuple(m.split()) for m in MERGES], model_max_length=WINDOW)


def written_by_transformers(folder):
    theirs_new().save_pretrained(folder)


def written_after_use(folder):
    """Padding and truncation then stand in tokenizer.json."""
    used = theirs_new()
    used("cat", padding="max_length", max_length=5, truncation=True)
    used.save_pretrained(folder)


def written_by_transformers_4(folder):
    """Roles in tokenizer_config.json, "added_tokens_decoder" instead of special_tokens_map.json, merges as text."""
    theirs_new().save_pretrained(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["model"]["merges"] = MERGES
    listed = {str(VOCAB[word]): token(word, special=True, normalized=True) for word in (START, END)}
    listed[str(VOCAB["!"])] = token("!", special=True, normalized=False)
    config = {"added_tokens_decoder": listed, "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": "!"}
    config |= {"model_max_length": WINDOW, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    write(folder, tokenizer=whole, tokenizer_config=config, special_tokens_map={**NAMED, "pad_token": END})


def with_words_of_its_own(folder):
    """As after textual inversion."""
    tokenizer = theirs_new()
    tokenizer.add_tokens(
        ["<sks>", AddedToken("Cat-Toy", single_word=True, normalized=False), AddedToken("dog ", lstrip=True)]
    )
    tokenizer.save_pretrained(folder)


def with_words_of_its_own_in_a_file(folder):
    published_1(folder)
    write(folder, added_tokens={"<sks>": len(VOCAB), "Cat-Toy": len(VOCAB) + 1})


def few_letters(folder):
    """Most texts hold bytes that have no token."""
    small_pipeline.tokenizer().save_pretrained(folder)


FOLDERS = [words, words_and_window, published_1, published_2, written_by_transformers, written_after_use]
FOLDERS += [written_by_transformers_4, with_words_of_its_own, with_words_of_its_own_in_a_file, few_letters]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda make: make.__name__)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    request.param(path)
    return path


@pytest.fixture(scope="module")
def pair(folder):
    return CLIPTokenizer.from_pretrained(folder), Tokenizer.from_pretrained(folder)


def expected_ids(theirs, texts, window=WINDOW):
    return theirs(texts, padding="max_length", max_length=window, truncation=True, return_tensors="pt").input_ids


PIECES = ["cat", "Red dog", "!", "!!", "'s", "don't", "é", "e\u0301", "\u00a0", " \t\n ", "日本", "👍🏽", "½", "İ", "ß"]
PIECES += ["\u200d", "\x00", "<sks>", "cat-toy", "Cat-Toy", START, END, END.upper(), "<|endoftext", "|>", "2024", "_"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=8) | st.sampled_from([" ", "  "]), max_size=12).map("".join)


@given(text=TEXTS)
@example(text="")
@example(text="cat " * 50)
@example(text="wow!! a cat-toy, Cat-Toy <sks>dog  dog")
@example(text=f"a {END} b{START}{END.upper()} c")
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids(pair, text):
    theirs, ours = pair
    assert torch.equal(ours.tokens([text], WINDOW), expected_ids(theirs, [text]))


def test_several_prompts_and_what_belongs_to_them(pair):
    theirs, ours = pair
    texts = ["a red cat", "", "dog " * 30]
    for window in (2, 3, WINDOW, 40):
        assert torch.equal(ours.tokens(texts, window), expected_ids(theirs, texts, window))
    assert len(ours) == len(theirs)
    assert (ours.start, ours.end, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.window == (theirs.model_max_length if theirs.model_max_length < 1e9 else None)


def test_what_is_written_opens_everywhere_with_the_same_ids(pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    }
    texts = [*PIECES, "".join(PIECES), " ".join(PIECES)]
    expected = expected_ids(theirs, texts)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(expected_ids(again, texts), expected)
    assert again.model_max_length == theirs.model_max_length
    read = Tokenizer.from_pretrained(tmp_path)
    assert torch.equal(read.tokens(texts, WINDOW), expected)
    assert (read.roles, read.window) == (ours.roles, ours.window)
    (tmp_path / "tokenizer.json").unlink()
    plain = PIECES[: PIECES.index("<sks>")]  # words that were added stand in tokenizer.json alone
    assert torch.equal(Tokenizer.from_pretrained(tmp_path).tokens(plain, WINDOW), expected[: len(plain)])


def test_where_the_characters_of_each_token_begin(pair):
    _, ours = pair
    ids, begins = ours.split("cat  Red \udcff")  # not UTF-8 on the command line
    assert ours.framed(ids, 7) == ours.tokens(["cat red ?"], 7)[0].tolist()
    assert begins == sorted(begins)
    assert begins[0] == 0
    assert begins[-1] == 9


def broken(folder, case):
    words_and_window(folder)
    vocab = folder / "vocab.json"
    if case == "cut":
        vocab.write_text(vocab.read_text()[:50])
    elif case == "absent":
        vocab.unlink()
    elif case == "merges":
        (folder / "merges.txt").write_text("z z\nzz zz\n")
    elif case == "merges of other words":
        write(folder, vocab={"a": 0, START: 1, END: 2})
    elif case == "config":
        (folder / "tokenizer_config.json").write_text("{")
    elif case == "window":
        write(folder, tokenizer_config={"model_max_length": "long"})
    elif case == "roles":
        write(folder, tokenizer_config={"pad_token": 3})
    elif case == "empty":
        write(folder, tokenizer={})
        (folder / "tokenizer.json").write_text("{}")
        vocab.unlink()
    elif case == "shape":
        write(folder, tokenizer={"model": []})


@pytest.mark.parametrize(
    "case", ["cut", "absent", "merges", "merges of other words", "config", "window", "roles", "empty", "shape"]
)
def test_a_broken_folder_is_named(tmp_path, case):
    broken(tmp_path, case)
    with pytest.raises(GazeError, match=str(tmp_path)):
        Tokenizer.from_pretrained(tmp_path)
