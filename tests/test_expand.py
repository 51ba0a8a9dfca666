"""Prompts that a language model adds to: by the command line and from Python, and pictures made again without it."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.errors import GazeError
from diffusion.prompts import parse
from pipelines.expand import _added, expand, open_writer
from pipelines.png import read_settings
from tests.test_prompts import ANYTHING


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers.utils.logging import disable_progress_bar  # as the command does before it is imported

    from tests.borrowed_models import CHAT, blip, causal

    disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    causal(folder / "story")
    causal(folder / "chat", chat_template=CHAT)
    blip(folder / "blip")
    return folder


@pytest.fixture(scope="module")
def writer(models):
    return open_writer(models / "story")


def pixels(path):
    with Image.open(path) as image:
        return image.tobytes()


def continuation(folder, text, tokens):
    """What transformers' own class says is the likeliest."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    words = AutoTokenizer.from_pretrained(folder)
    inputs = words(text, return_tensors="pt")
    ids = GPT2LMHeadModel.from_pretrained(folder).eval().generate(**inputs, max_new_tokens=tokens, do_sample=False)
    added = ids[0][inputs["input_ids"].shape[1] :]
    return words.decode(added, skip_special_tokens=True), len(added) == tokens


# The words


def test_the_likeliest_words_are_those_of_transformers(models, writer):
    expected = _added("a red apple", *continuation(models / "story", "a red apple ,", 12))
    assert len(expected.split()) > 2
    for seed in (0, 5):
        longer = expand(writer, "a (red:1.3) apple", seed, 12, temperature=0)
        (chunk,) = parse(longer)
        assert chunk.text == f"a red apple, {expected}"
        assert longer.startswith("a (red:1.3) apple, ")


def test_drawn_words_are_a_function_of_prompt_and_seed(writer):
    texts = [expand(writer, "a red apple", seed, 10) for seed in range(6)]
    assert len({*texts}) > 3
    assert [expand(writer, "a red apple", seed, 10) for seed in range(6)] == texts
    assert all(text.startswith("a red apple") for text in texts)
    assert expand(writer, "", 0) == ""
    assert expand(writer, " ( BREAK ", 0) == " ( BREAK "


def test_a_model_that_answers_is_asked_for_details(models):
    chat = open_writer(models / "chat", "cpu")
    longer = expand(chat, "a red apple", 0, 12, temperature=0)
    assert longer.startswith("a red apple, ")
    assert longer != expand(open_writer(models / "story"), "a red apple", 0, 12, temperature=0)


@pytest.mark.parametrize(
    ("text", "unfinished", "expected"),
    [
        (" , in soft light. ", False, "in soft light"),
        ("\n\n in soft light\nUser: what", True, "in soft light"),
        ("in soft light, on green gra", True, "in soft light"),
        ("in soft light on gra", True, "in soft light on"),
        ('"A red apple, in soft light"', False, "in soft light"),
        ("a BREAK in BREAKING \ufffd", False, "a break in BREAKING"),
        (" ... ", False, ""),
        ("", True, ""),
    ],
)
def test_what_is_taken_of_a_models_words(text, unfinished, expected):
    assert _added("a red apple", text, unfinished) == expected


def test_a_prompt_that_is_repeated_in_other_letters_is_no_addition():
    assert _added("Straße bei Nacht", "STRASSE BEI NACHT, im Regen", False) == "im Regen"
    assert _added("İstanbul", "i̇stanbul, at night", False) == "at night"


@settings(max_examples=150, deadline=None)
@given(ANYTHING, st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_whatever_is_asked_and_added_the_prompt_keeps_its_meaning(prompt, text):
    """With a writer whose model says this text."""
    import torch

    class Said:
        chat_template = None

        def __call__(self, said, return_tensors):
            return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

        def decode(self, row, skip_special_tokens):
            return text

    class Network(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        class config:
            get_text_config = staticmethod(lambda: None)

        def generate(self, input_ids, **_):
            return input_ids

    from pipelines.expand import Writer

    longer = expand(Writer(Network(), Said()), prompt, 0)
    *before, last = parse(prompt)
    *same, end = parse(longer)
    assert same == before
    if longer != prompt:
        kept = len(last.text.rstrip(" ,"))
        assert end.text[:kept] == last.text[:kept]
        assert end.weights_at(range(kept)) == last.weights_at(range(kept))
        rest = range(len(last.text) if "(" in prompt or "[" in prompt else kept, len(end.text))
        assert {*end.weights_at(rest)} <= {1.0}


# Pictures


def test_a_picture_says_what_it_was_drawn_from_and_is_drawn_again_without_the_model(gaze, model, models):
    shutil.copytree(models / "story", "story")
    words = ["generate", "a red cat", "--model", model, "--steps", 2, "--expand", "story", "--expand-tokens", 8]
    code, out, err = gaze(*words, "--seed", 3, "-n", 2, "-o", "cat.png")
    assert (code, err) == (0, "")
    first, second = read_settings("cat-0.png"), read_settings("cat-1.png")
    assert first["prompt"].startswith("a red cat, ")
    assert first["prompt"] != second["prompt"]
    assert first["expanded"] == {"prompt": "a red cat", "model": "story", "tokens": 8, "temperature": 1.0}
    lines = out.splitlines()
    assert lines[1::2] == [f"  {first['prompt']}", f"  {second['prompt']}"]
    gaze(*words, "--seed", 4, "-o", "again.png")
    assert read_settings("again.png") == second
    assert pixels("again.png") == pixels("cat-1.png")
    shutil.rmtree("story")
    assert gaze("info", "cat-0.png")[1].splitlines()[0] == f"{'prompt':<21}{first['prompt']}"
    code, out, err = gaze("generate", "--like", "cat-0.png", "-o", "like.png")
    assert (code, err) == (0, "")
    assert pixels("like.png") == pixels("cat-0.png")
    assert read_settings("like.png") == {name: value for name, value in first.items() if name != "expanded"}


def test_prompts_of_a_file_and_their_sheet(gaze, model, models):
    Path("prompts.txt").write_text("a red cat\n[a dog\n")
    words = ["generate", "--prompts", "prompts.txt", "--model", model, "--steps", 1, "--expand", models / "story"]
    code, out, _ = gaze(*words, "--expand-temperature", 0, "-n", 2, "--sheet", "sheet.png", "--json")
    assert code == 0
    texts = [row["prompt"] for row in json.loads(out)["pictures"]]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert texts[2].startswith("[a dog], ")
    assert [row["prompt"] for row in read_settings("sheet.png")["pictures"]] == texts


def test_each_cell_of_a_grid_is_expanded_by_its_prompt_and_seed(gaze, model, models):
    axes = ["--x", "replace=red,green", "--y", "seed=1,2"]
    words = ["--model", model, "--steps", 1, "--expand", models / "story", "--expand-tokens", 6, "-o", "grid.png"]
    code, out, err = gaze("grid", "a red cat", *axes, *words)
    assert (code, err) == (0, "")
    cells = read_settings("grid.png")["pictures"]
    assert [cell["expanded"]["prompt"] for cell in cells] == ["a red cat", "a green cat"] * 2
    own = open_writer(models / "story")
    assert [cell["prompt"] for cell in cells] == [expand(own, c["expanded"]["prompt"], c["seed"], 6) for c in cells]
    assert f"  {cells[3]['prompt']}\n" in out


# What cannot be


def refusal(*arguments, **options):
    with pytest.raises(GazeError) as error:
        open_writer(*arguments, **options)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_a_model_of_another_kind_says_what_it_is(models, folder):
    said = refusal(models / "blip")
    assert "is a BlipForConditionalGeneration, and a causal language model, such as GPT-2" in said
    assert "config.json" in refusal(folder)
    assert "there is no model folder" in refusal("nowhere")
    assert "its id on the hub, owner/name" in refusal("gpt2")


def test_a_model_that_is_not_here_says_how_to_fetch_it(monkeypatch, tmp_path, gaze, model):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = gaze("generate", "a cat", "--model", model, "--expand", "owner/name", "-o", "cat.png")
    assert code == 1
    assert "hf download owner/name --local-dir FOLDER, then copy FOLDER and give its path" in err
    assert not Path("cat.png").exists()


def broken(models, tmp_path, change):
    shutil.copytree(models / "story", tmp_path / "story")
    change(tmp_path / "story")
    return refusal(tmp_path / "story")


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_an_encoder_is_no_causal_model(models, tmp_path):
    """transformers would open it, and it would write nonsense."""
    said = broken(
        models, tmp_path, lambda folder: write_config(folder, architectures=["GPT2ForSequenceClassification"])
    )
    assert "is a GPT2ForSequenceClassification, and a causal language model" in said


def test_code_of_a_model_is_not_run(models, tmp_path):
    def change(folder):
        write_config(folder, model_type="odd", auto_map={"AutoConfig": "code.Odd", "AutoModelForCausalLM": "code.Odd"})
        (folder / "code.py").write_text("raise SystemExit('it ran')")

    assert "which transformers" in (said := broken(models, tmp_path, change))
    assert "and the code that it brings is not run" in said


def test_a_pickle_is_not_opened(models, tmp_path):
    def change(folder):
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    assert "is a pickle, which can run code and is never opened" in broken(models, tmp_path, change)


def test_a_model_of_the_hub_that_has_pickles_alone(models, tmp_path, monkeypatch):
    shutil.copytree(models / "story", tmp_path / "snapshot")
    (tmp_path / "snapshot" / "model.safetensors").unlink()
    monkeypatch.setattr("pipelines.borrowed.local_path", lambda *_: tmp_path / "snapshot")
    said = refusal("owner/name@v2")
    assert "owner/name@v2: " in said
    assert "holds no model.safetensors" in said
    assert "such as owner/name@refs/pr/1" in said


def test_weights_that_are_cut_off_or_missing_are_named(models, tmp_path):
    def cut(folder):
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[:-100])

    assert "cannot be read as safetensors" in broken(models, tmp_path, cut)
    shutil.rmtree(tmp_path / "story")
    assert "are not all that GPT2LMHeadModel needs" in broken(
        models, tmp_path, lambda folder: write_config(folder, n_layer=3)
    )


def test_a_folder_without_words_and_one_with_an_adapter(models, tmp_path):
    def wordless(folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()

    assert "has no words for its tokenizer" in broken(models, tmp_path, wordless)
    (tmp_path / "story" / "adapter_config.json").write_text("{}")
    assert "holds an adapter for another model" in refusal(tmp_path / "story")


def test_values_that_cannot_be_are_named(writer):
    for options, says in (
        ({"tokens": 0}, "tokens is 0"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"tokens": 126}, "the prompt takes 3 tokens, and 126 more are to be added; the language model reads 128"),
    ):
        with pytest.raises(GazeError, match=says):
            expand(writer, "a cat", 0, **options)
