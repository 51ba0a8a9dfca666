"""CLIPScore and SigLIP's probability, held against transformers' own logits."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import normalizers
from transformers import AutoProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast, SiglipModel, SiglipProcessor

from diffusion.errors import GazeError
from pipelines.judges.clip import clip_judge
from pipelines.judges.interval import of_mean
from tests.judges import small_judges

PROMPTS = ["a red cat", "dog", "a dog on a red cat (blue)"]


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((40, 40), (32, 50), (64, 48))
    ]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(small_judges.clip(tmp_path_factory.mktemp("clip")))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    return str(small_judges.siglip(tmp_path_factory.mktemp("siglip")))


def logits(model, processor, texts, pictures, **options):
    """Of each text with each picture, [pictures, texts]."""
    inputs = processor(text=texts, images=pictures, return_tensors="pt", truncation=True, **options)
    with torch.no_grad():
        return model(**inputs).logits_per_image.double().numpy()


def test_clipscore_is_that_of_the_paper(clip, pictures):
    judge, about = clip_judge(clip)
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    texts = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    cosines = logits(model, processor, texts, pictures, padding=True).diagonal() / model.logit_scale.exp().item()
    assert cosines.min() > 0
    verdicts = judge(PROMPTS, pictures)
    assert [verdict.score for verdict in verdicts] == pytest.approx(2.5 * np.maximum(cosines, 0), abs=1e-5)
    assert [verdict.said["cosine"] for verdict in verdicts] == pytest.approx(cosines, abs=1e-5)
    stated = {"formula": "2.5 * max(cosine, 0)", "prefix": "A photo depicts ", "judge_dtype": "float32"}
    assert about == {"judge": clip, **stated}


def test_clipscore_does_not_go_below_nothing(tmp_path, clip, pictures):
    model = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    small_judges.saved(tmp_path, model, CLIPProcessor.from_pretrained(clip))
    verdicts = clip_judge(str(tmp_path))[0](PROMPTS, pictures)
    assert [verdict.score for verdict in verdicts] == [0.0, 0.0, 0.0]
    assert max(verdict.said["cosine"] for verdict in verdicts) < 0


def test_another_prefix(clip, pictures):
    judge, _ = clip_judge(clip, prefix="")
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    cosines = logits(model, processor, PROMPTS, pictures, padding=True).diagonal() / model.logit_scale.exp().item()
    assert [verdict.said["cosine"] for verdict in judge(PROMPTS, pictures)] == pytest.approx(cosines, abs=1e-5)


def test_siglip_gives_its_own_probability(siglip, pictures):
    judge, about = clip_judge(siglip)
    model, processor = SiglipModel.from_pretrained(siglip), SiglipProcessor.from_pretrained(siglip)
    whole = {"padding": "max_length", "max_length": small_judges.LONGEST}
    chances = 1 / (1 + np.exp(-logits(model, processor, PROMPTS, pictures, **whole).diagonal()))
    assert [verdict.score for verdict in judge(PROMPTS, pictures)] == pytest.approx(chances, abs=1e-5)
    assert about["prefix"] == ""


def test_a_prompt_that_is_too_long_is_said_to_be_cut(clip, pictures):
    judge, _ = clip_judge(clip, prefix="")
    short, long = judge(["cat", "cat " * 50], pictures[:2])
    assert (short.said["cut"], long.said["cut"]) == (False, True)


def test_siglip_reads_small_letters(tmp_path, siglip, pictures):
    """As it was trained; its second version is often stored with a tokenizer that keeps capitals."""
    model, processor = SiglipModel.from_pretrained(siglip), SiglipProcessor.from_pretrained(siglip)
    words = processor.tokenizer.backend_tokenizer
    words.normalizer = normalizers.NFC()
    marks = {name: getattr(processor.tokenizer, name) for name in ("pad_token", "eos_token", "unk_token")}
    kept = PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=small_judges.LONGEST, **marks)
    small_judges.saved(tmp_path, model, SiglipProcessor(processor.image_processor, kept))
    read = AutoProcessor.from_pretrained(tmp_path, backend="pil").tokenizer
    assert read("A Red CAT").input_ids != read("a red cat").input_ids
    judge, _ = clip_judge(str(tmp_path))
    assert judge(["A Red CAT"], pictures[:1]) == judge(["a red cat"], pictures[:1])


def test_a_verdict_does_not_depend_on_its_company(clip, pictures):
    judge, _ = clip_judge(clip)
    together = judge(PROMPTS, pictures)
    alone = [judge([prompt], [picture])[0] for prompt, picture in zip(PROMPTS, pictures, strict=True)]
    assert [verdict.score for verdict in together] == pytest.approx([verdict.score for verdict in alone], abs=1e-5)


def test_other_models_are_refused(tmp_path, clip):
    with pytest.raises(GazeError, match="Dinov2Model, and a model that embeds texts and pictures"):
        clip_judge(str(small_judges.dinov2(tmp_path / "dinov2")))
    with pytest.raises(GazeError, match="no model folder 'nowhere'"):
        clip_judge("nowhere")
    with pytest.raises(GazeError, match="unknown dtype"):
        clip_judge(clip, dtype="float8")


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_the_command_draws_and_judges(gaze, model, clip, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"a red cat {i}"}) + "\n" for i in range(12)))
    options = ["evaluate", "clip", "--judge", clip, "--model", model, "--steps", 1, "--prompts", "prompts.jsonl"]
    code, out, err = gaze(*options, "-n", 10, "--seed", 3, "--json", "--page", "worst.html")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["n"] == len(report["pictures"]) == 10
    assert report["low"] <= report["score"] <= report["high"]
    assert report["score"] == pytest.approx(np.mean([picture["score"] for picture in report["pictures"]]))
    told = of_mean([picture["score"] for picture in report["pictures"]], seed=3)
    assert (report["low"], report["high"]) == pytest.approx((told["low"], told["high"]), abs=1e-9)
    assert [picture["seed"] for picture in report["pictures"]] == [*range(3, 13)]
    assert report["pictures"][4]["prompt"] == "a red cat 4"
    assert report["settings"]["num_inference_steps"] == 1
    assert report["settings"]["judge"] == clip
    page = (tmp_path / "worst.html").read_text()
    order = sorted(report["pictures"], key=lambda picture: picture["score"])
    assert [page.index(f"<b>{picture['prompt']}</b>") for picture in order] == sorted(
        page.index(f"<b>{picture['prompt']}</b>") for picture in order
    )
    assert page.count('<img class="small"') == 10

    # The same pictures, finished: drawn by `gaze generate`, their prompts inside.
    drawn = ["generate", "--model", model, "--steps", 1, "--seed", 3, "-o", "out/p{i}.png"]
    assert gaze(*drawn, *(f"a red cat {i}" for i in range(10)))[0] == 0
    code, out, err = gaze("evaluate", "clip", "--judge", clip, "--pictures", "out", "--json")
    again = json.loads(out)
    assert (code, err) == (0, "")
    assert [picture["score"] for picture in again["pictures"]] == [picture["score"] for picture in report["pictures"]]
    assert (again["low"], again["high"], again["settings"]["pictures"]) == (
        *(pytest.approx(report[end], abs=0.1) for end in ("low", "high")), "out",
    )  # fmt: skip


def test_the_command_names_what_is_wrong(gaze, model, clip, tmp_path):
    (tmp_path / "few.txt").write_text("a cat\n" * 9)
    (tmp_path / "bare").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "bare" / "1.png")
    (tmp_path / "empty").mkdir()
    clip_of = ["evaluate", "clip", "--judge", clip]
    for options, says in (
        ([*clip_of, "--prompts", "few.txt"], "9 pictures are too few for an interval"),
        ([*clip_of], "neither --prompts nor"),
        ([*clip_of, "--prompts", "few.txt", "--pictures", "bare"], "both --prompts"),
        ([*clip_of, "--pictures", "bare"], "bare/1.png has no prompt"),
        ([*clip_of, "--pictures", "empty"], "'empty' holds no picture"),
        ([*clip_of, "--pictures", "bare", "--steps", 3], "num_inference_steps would say how to draw"),
        ([*clip_of, "--prompts", "few.txt", "-n", 12], "more than the 9"),
        (["evaluate", "clip", "--judge", "nowhere/none", "--prompts", "few.txt", "-n", 9], "too few"),
    ):
        code, out, err = gaze(*options)
        assert (code, out) == (1, ""), options
        assert says in err, (options, err)
        assert len(err.splitlines()) <= 3
