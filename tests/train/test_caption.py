"""Captions by models of transformers: what they say, which pictures get them, and what a killed command leaves."""

import functools
import json
import os
import shutil
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed import HashStore

from diffusion.errors import GazeError
from pipelines.borrowed import NUCLEUS, write
from pipelines.images import to_pil
from pipelines.processes import Processes
from tests.pictures import odd_folder, picture
from train.data import caption as work
from train.data.caption import Asked, caption
from train.data.captioner import Captioner, prepare
from train.data.decode import decode
from train.data.folder import Folder
from train.data.source import Entry

# What a model is asked: its folder is not opened where `fake` stands in for it.
PLAIN = Asked("fake")


def said(root):
    return {entry.name: list(entry.captions) for entry in Folder(root)}


def mean(path):
    """What `fake` says of a picture."""
    return f"mean {np.asarray(Image.open(path), np.float64).mean():.3f}"


def rows(root):
    return [json.loads(line) for line in (root / "metadata.jsonl").read_text("utf-8-sig").splitlines()]


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a.png", "sub/c.png", "d.png", "é.png")):
        picture(37 * number, 24).save(root / name)
    return root


@pytest.fixture
def fake(monkeypatch):
    """A captioner that says the mean of a picture; gives the numbers of the pictures in each batch that it was asked
    about."""
    batches = []

    def read(captioner, pictures):
        return {"mean": torch.tensor([np.asarray(one, np.float64).mean() for one in pictures])}

    def answer(captioner, inputs, tokens, beams, count, temperature, draws):
        batches.append(len(inputs["mean"]))
        return [[f"mean {value:.3f}" for _ in range(1)] for value in inputs["mean"].tolist()]

    monkeypatch.setattr(work, "open_captioner", lambda *_: Captioner(None, None, None, None))
    monkeypatch.setattr(work, "prepare", read)
    monkeypatch.setattr(work, "captions", answer)
    return batches


# What a model says


def test_a_picture_of_which_the_model_says_nothing_is_named(pictures, fake, monkeypatch):
    answer = work.captions
    monkeypatch.setattr(work, "captions", lambda *asked: [[], *answer(*asked)[1:]])
    (pictures / "metadata.jsonl").write_text('{"file_name": "d.png"}\n')
    assert caption(pictures, PLAIN) == (4, 0, [("d.png", "the model says nothing of it")])
    assert rows(pictures)[0] == {"file_name": "d.png"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers.utils.logging import disable_progress_bar  # as the command does before it is imported

    from tests.borrowed_models import CAPTIONERS, causal

    disable_progress_bar()
    folder = tmp_path_factory.mktemp("models")
    for name, make in {**CAPTIONERS, "gpt2": causal}.items():
        make(folder / name)
    return folder


@functools.cache
def parts_of(folder, kind):
    import transformers as t

    parts = {
        "blip": (t.BlipForConditionalGeneration, t.BlipProcessor),
        "git": (t.GitForCausalLM, t.GitProcessor),
        "llava": (t.LlavaForConditionalGeneration, t.LlavaProcessor),
        "vit_gpt2": (t.VisionEncoderDecoderModel, t.AutoImageProcessor),
    }
    network, processor = (part.from_pretrained(folder / kind) for part in parts[kind])
    return network.eval(), processor, t.AutoTokenizer.from_pretrained(folder / kind)


def alone(folder, kind, path, prompt=None, **options):
    """What transformers' own class and processor say of one picture."""
    network, processor, words = parts_of(folder, kind)
    text = {} if prompt is None else {"text": prompt}
    inputs = processor(images=Image.open(path), return_tensors="pt", **text)
    if prompt is None:
        inputs = {"pixel_values": inputs["pixel_values"]}
    ids = network.generate(**inputs, max_new_tokens=6, **options)
    text = words.batch_decode(ids, skip_special_tokens=True)
    before = words.decode(inputs["input_ids"][0], skip_special_tokens=True) if prompt else ""
    return [*dict.fromkeys(one.removeprefix(before).strip() for one in text if one != before)]


@pytest.mark.parametrize("kind", ["blip", "git", "vit_gpt2"])
def test_captions_are_those_of_transformers_whatever_is_beside_them(models, pictures, kind):
    asked = Asked(str(models / kind), tokens=6)
    names = [path.relative_to(pictures).as_posix() for path in pictures.rglob("*.png")]
    assert len({str(alone(models, kind, pictures / name)) for name in names}) > 1, "the picture decides"
    caption(pictures, asked, batch_size=2)
    assert said(pictures) == {name: texts for name in names if (texts := alone(models, kind, pictures / name))}
    (pictures / "metadata.jsonl").unlink()
    caption(pictures, asked._replace(beams=3, captions=2), batch_size=5)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert said(pictures) == {name: texts for name in names if (texts := alone(models, kind, pictures / name, **beams))}


@pytest.mark.parametrize(
    ("kind", "prompt", "whole"),
    [("blip", "a dog", "a dog"), ("llava", "red of cat", "user <image> red of cat assistant")],
)
def test_a_prompt_is_answered_and_is_no_part_of_the_caption(models, pictures, kind, prompt, whole):
    caption(pictures, Asked(str(models / kind), prompt, tokens=6), batch_size=3)
    for name, texts in said(pictures).items():
        assert texts == alone(models, kind, pictures / name, whole)


def test_drawn_words_depend_on_seed_and_name_alone(models, pictures, tmp_path):
    asked = Asked(str(models / "git"), tokens=6, captions=3, temperature=1.5, seed=4)
    shutil.copy(pictures / "a.png", pictures / "twin.png")
    caption(pictures, asked, batch_size=5)
    drawn = said(pictures)
    assert drawn["twin.png"] != drawn["a.png"]
    for few in ("a.png", "d.png"):
        (tmp_path / few[0]).mkdir()
        shutil.copy(pictures / few, tmp_path / few[0])
        caption(tmp_path / few[0], asked, batch_size=1)
        assert said(tmp_path / few[0]) == {few: drawn[few]}
    assert max(map(len, drawn.values())) == 3
    caption(pictures, asked._replace(seed=5, existing="replace"), batch_size=2)
    assert said(pictures) != drawn


def test_words_are_drawn_as_often_as_the_model_says():
    """Against the softmax of the likeliest words that have NUCLEUS together, at a temperature."""
    logits_V, temperature, rows = torch.tensor([2.0, 1.5, 0.0, -1.0, -6.0]), 1.5, 4000

    class OneStep:
        dtype, device = torch.float32, torch.device("cpu")

        def generate(self, logits_processor, **_):
            return logits_processor(None, logits_V.expand(rows, -1)).argmax(1)

    words_B = write(OneStep(), {}, 1, temperature=temperature, draws=[*map(np.random.default_rng, range(rows))])
    shares = np.exp(logits_V.double().numpy() / temperature)
    shares /= shares.sum()
    kept = shares.cumsum() - shares < NUCLEUS  # they are sorted
    expected = np.where(kept, shares, 0) / shares[kept].sum()
    counts = Counter(words_B.tolist())
    found = np.array([counts[word] for word in range(len(shares))]) / rows
    assert 0 < kept.sum() < len(shares)
    assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / rows)
    assert (found[~kept] == 0).all()


# Which pictures, and what becomes of the lines that are there


def test_lines_that_are_there_stay_to_the_byte_and_the_others_get_captions(pictures, fake):
    before = [
        b'\xef\xbb\xbf{"file_name":"d.png", "text":  "mine", "tags": [1]}\r',
        b'{"file_name": "a.png", "repeats": 2}',
        b"",
        b'{"file_name": "sub/../b.png", "text": null, "repeats": 0}',
    ]
    (pictures / "metadata.jsonl").write_bytes(b"\n".join(before))
    (pictures / "é.txt").write_text("of a file")
    assert caption(pictures, PLAIN) == (2, 2, [])
    after = (pictures / "metadata.jsonl").read_bytes().split(b"\n")
    assert after[0] == before[0]
    assert after[2] == before[3]
    assert rows(pictures)[1:2] == [{"file_name": "a.png", "repeats": 2, "text": mean(pictures / "a.png")}]
    assert rows(pictures)[3:] == [
        {"file_name": "sub/c.png", "text": mean(pictures / "sub" / "c.png")},
        {"file_name": "é.png", "text": "of a file"},
    ]
    assert "é" in (pictures / "metadata.jsonl").read_text("utf-8")
    again = (pictures / "metadata.jsonl").read_bytes()
    assert caption(pictures, PLAIN) == (0, 4, [])
    assert (pictures / "metadata.jsonl").read_bytes() == again
    assert sum(fake) == 2


def test_existing_captions_are_replaced_or_added_to_where_that_is_asked(pictures, fake):
    for name in ("a.txt", "b.txt"):
        (pictures / name).write_text("mine")
    caption(pictures, PLAIN._replace(existing="add"))
    assert said(pictures)["a.png"] == ["mine", mean(pictures / "a.png")]
    assert said(pictures)["d.png"] == [mean(pictures / "d.png")]
    added = (pictures / "metadata.jsonl").read_bytes()
    caption(pictures, PLAIN._replace(existing="add"))
    assert (pictures / "metadata.jsonl").read_bytes() == added, "nothing is said twice"
    caption(pictures, PLAIN._replace(existing="replace"))
    assert said(pictures)["a.png"] == [mean(pictures / "a.png")]


def test_blank_captions_are_none(pictures, fake):
    (pictures / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["", " "]}\n')
    (pictures / "b.txt").write_text(" \n")
    assert caption(pictures, PLAIN) == (5, 0, [])
    assert rows(pictures)[:2] == [{"file_name": name, "text": mean(pictures / name)} for name in ("a.png", "b.png")]


def test_masks_are_no_pictures_of_their_own(pictures, fake):
    (pictures / "metadata.jsonl").write_text('{"file_name": "a.png", "masks": "sub/c.png"}\n')
    caption(pictures, PLAIN)
    assert [*said(pictures)] == ["a.png", "b.png", "d.png", "é.png"]


def test_a_folder_in_which_all_have_captions_is_left_as_it_is(pictures, fake):
    for path in [*pictures.rglob("*.png")]:
        path.with_suffix(".txt").write_text("mine")
    assert caption(pictures, PLAIN) == (0, 5, [])
    assert not (pictures / "metadata.jsonl").exists()
    assert fake == []


def test_pictures_that_do_not_decode_are_named_and_the_others_captioned(tmp_path, fake, monkeypatch):
    good, bad = odd_folder(tmp_path / "odd", 60, 24)
    (tmp_path / "odd" / "metadata.jsonl").unlink()
    narrow = good.pop(3)
    Image.new("RGB", (1, 300)).save(tmp_path / "odd" / narrow)
    read = work.prepare

    def refuses(captioner, pictures):
        if any(one.height > 200 for one in pictures):
            raise ValueError("aspect ratio")
        return read(captioner, pictures)

    monkeypatch.setattr(work, "prepare", refuses)
    report = caption(tmp_path / "odd", PLAIN, batch_size=7, workers=1)
    # Silent ones lack a caption, which is what this command is for.
    undecoded = [name for name in bad if "silent" not in name]
    assert [one.name for one in report.skipped if one.name != narrow] == sorted(undecoded)
    assert dict(report.skipped)[narrow] == "the model's processor refuses it: ValueError: aspect ratio"
    assert report.captioned == 60 - len(undecoded) - 1
    assert {entry.name for entry in Folder(tmp_path / "odd")}.isdisjoint([*undecoded, narrow])


def test_the_model_sees_what_training_sees(tmp_path, fake, monkeypatch):
    odd_folder(tmp_path / "odd", 60, 24)
    seen = {}
    monkeypatch.setattr(work, "prepare", lambda _, pictures: seen.update(enumerate(pictures)) or {})
    names = [path.name for path in sorted((tmp_path / "odd").glob("*.*g"))]
    batch = work._read_batch(tmp_path / "odd", Captioner(None, None, None, None), names, len(names), 0)
    assert len(batch.names) > 40
    for number, name in enumerate(batch.names):
        size = seen[number].height, seen[number].width
        (trained,) = to_pil(decode(tmp_path / "odd" / name, size)[0][None])
        assert trained.tobytes() == seen[number].tobytes()


def test_pictures_from_a_camera_are_made_smaller_first(tmp_path, fake, monkeypatch):
    (tmp_path / "large").mkdir()
    Image.new("RGB", (4096, 1024), "red").save(tmp_path / "large" / "a.png")
    seen = []
    monkeypatch.setattr(work, "prepare", lambda _, pictures: seen.extend(pictures) or {})
    work._read_batch(tmp_path / "large", Captioner(None, None, None, None), ["a.png"], 1, 0)
    assert [one.size for one in seen] == [(2048, 512)]


# What a killed command leaves


def journal(root):
    return root / "captions-0.unfinished"


def test_after_a_kill_the_same_command_goes_on(pictures, fake):
    """A child that is killed with its third batch half done."""
    child = os.fork()
    if child == 0:
        answer, calls = work.captions, []

        def killed(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer(*arguments)

        work.captions = killed
        caption(pictures, PLAIN, batch_size=1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not (pictures / "metadata.jsonl").exists()
    assert len(journal(pictures).read_bytes().splitlines()) == 3
    assert caption(pictures, PLAIN) == (5, 0, [])
    assert fake == [3], "two of five were kept"
    assert [*pictures.glob("captions*")] == []


def test_wherever_a_file_was_cut_off_no_caption_is_lost_or_asked_for_twice(pictures, fake, tmp_path, monkeypatch):
    monkeypatch.setattr("train.data.caption._finish", lambda *_: None)
    caption(pictures, PLAIN, batch_size=2)
    whole = journal(pictures).read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(work, "open_captioner", lambda *_: Captioner(None, None, None, None))
    monkeypatch.setattr(work, "prepare", lambda _, pictures: {"mean": torch.zeros(len(pictures))})
    asked = []

    def answer(captioner, inputs, *_):
        asked.append(len(inputs["mean"]))
        return [["new"]] * len(inputs["mean"])

    monkeypatch.setattr(work, "captions", answer)
    for end in [*range(0, len(whole), 7), len(whole)]:
        journal(pictures).write_bytes(whole[:end])
        kept = max(whole[:end].count(b"\n") - 1, 0)
        asked.clear()
        assert caption(pictures, PLAIN, batch_size=4) == (5, 0, [])
        assert sum(asked) == 5 - kept
        assert Counter(texts[0] == "new" for texts in said(pictures).values()) == Counter({True: 5 - kept, False: kept})
        assert [*pictures.glob("captions*")] == []
        (pictures / "metadata.jsonl").unlink()


@pytest.mark.parametrize("existing", work.EXISTING)
def test_a_kill_between_the_last_two_steps_changes_nothing(pictures, fake, monkeypatch, existing):
    asked, finish = PLAIN._replace(existing=existing), work._finish
    (pictures / "a.txt").write_text("mine")

    def killed(root, *arguments):
        content = journal(root).read_bytes()
        report = finish(root, *arguments)
        journal(root).write_bytes(content)
        return report

    monkeypatch.setattr(work, "_finish", killed)
    caption(pictures, asked)
    monkeypatch.setattr(work, "_finish", finish)
    written = (pictures / "metadata.jsonl").read_bytes()
    assert caption(pictures, asked).captioned == sum(fake) == 5 - (existing == "keep")
    assert (pictures / "metadata.jsonl").read_bytes() == written
    assert [*pictures.glob("captions*")] == []


def test_processes_share_the_pictures(pictures, fake):
    store = HashStore()
    assert caption(pictures, PLAIN, batch_size=2, group=Processes(1, 2, store)) is None
    assert not (pictures / "metadata.jsonl").exists()
    assert caption(pictures, PLAIN, batch_size=2, group=Processes(0, 2, store)) == (5, 0, [])
    assert fake == [2, 2, 1]
    alone = said(pictures)
    caption(pictures, PLAIN._replace(existing="replace"))
    assert said(pictures) == alone


def test_another_number_of_processes_goes_on_with_what_is_there(pictures, fake):
    caption(pictures, PLAIN, group=Processes(2, 3, HashStore()))  # the others were killed before their first
    assert caption(pictures, PLAIN) == (5, 0, [])
    assert fake == [1, 4]


# What cannot be


def refusal(*arguments, **options):
    with pytest.raises(GazeError) as error:
        caption(*arguments, **options)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_values_that_cannot_be_are_named(pictures, fake, tmp_path):
    assert "no way to different ones" in (said := refusal(pictures, PLAIN._replace(captions=3)))
    assert "--beams 3 for as many likely ones, or --temperature 1" in said
    assert "one of the two" in refusal(pictures, PLAIN._replace(beams=2, temperature=1.0))
    assert "did you mean 'keep'" in refusal(pictures, PLAIN._replace(existing="kep"))
    assert "temperature is -1" in refusal(pictures, PLAIN._replace(temperature=-1))
    assert "tokens is 0" in refusal(pictures, PLAIN._replace(tokens=0))
    assert "batch-size is 0" in refusal(pictures, PLAIN, batch_size=0)
    assert "does not exist" in refusal(tmp_path / "none", PLAIN)
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refusal(tmp_path / "empty", PLAIN)
    assert fake == []


def test_an_unfinished_start_with_other_options_is_named(pictures, fake):
    journal(pictures).write_bytes(work._line(PLAIN._asdict()))
    said = refusal(pictures, PLAIN._replace(beams=4))
    assert "captions-0.unfinished holds captions of an earlier start with beams 1, now it is 4" in said
    assert "or remove the file" in said


def test_two_commands_do_not_write_the_same_file(pictures, fake):
    with work._continued(journal(pictures), PLAIN):
        assert "captions-0.unfinished is being written by another command" in refusal(pictures, PLAIN)
    assert caption(pictures, PLAIN).captioned == 5


def test_a_caption_whose_words_have_objects_is_not_replaced(pictures, fake):
    row = {"file_name": "a.png", "text": "disc", "words": [{"text": "disc", "objects": [0]}]}
    (pictures / "metadata.jsonl").write_text(json.dumps(row))
    assert "metadata.jsonl, line 1: words" in refusal(pictures, PLAIN._replace(existing="add"))
    assert caption(pictures, PLAIN).kept == 1


def test_a_link_out_of_the_folder_is_named(pictures, fake, tmp_path):
    shutil.copy(pictures / "a.png", tmp_path / "far.png")
    (pictures / "near.png").symlink_to(tmp_path / "far.png")
    assert "near.png is a link to a file outside the folder" in refusal(pictures, PLAIN)


def test_a_model_of_another_kind_says_what_it_is(models, pictures):
    said = refusal(pictures, Asked(str(models / "gpt2")))
    assert "is a GPT2LMHeadModel, and a captioning model, such as BLIP, GIT" in said
    assert "which takes no prompt" in refusal(pictures, Asked(str(models / "git"), "a photo of"))
    assert "there is no device 'gpu' here" in refusal(pictures, Asked(str(models / "git")), device="gpu")


def test_the_command_says_what_it_did(models, pictures, capsys):
    from train.data.command import main

    words = ["caption", str(pictures), "--model", str(models / "git"), "--tokens", "4", "--workers", "0"]
    (pictures / "broken.png").write_bytes(b"")
    assert main(words) == 0
    with pytest.raises(GazeError, match="--workers is -1"):
        main([*words[:-1], "-1"])
    printed = capsys.readouterr()
    assert printed.out == f"5 pictures captioned, 0 keep theirs, in {pictures / 'metadata.jsonl'}\n"
    assert (
        printed.err == "left out: broken.png: the file cannot be read as a picture: it is none, or of another format\n"
    )
    assert Entry("a.png", tuple(said(pictures)["a.png"])) in list(Folder(pictures))
    assert all(isinstance(value, torch.Tensor) for value in prepare(_git(models), [picture(1)]).values())


def _git(models):
    from train.data.captioner import open_captioner

    return open_captioner(models / "git", None, torch.device("cpu"))
