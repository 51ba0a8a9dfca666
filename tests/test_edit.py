"""Prompt-to-prompt: which words stand for which, what that does to attention, and what follows for the pictures."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusion.alignment import align, shared
from diffusion.attention import Attention
from diffusion.attention_sites import Site, attending, sites
from diffusion.errors import GazeError
from diffusion.injection import inject_cross
from diffusion.words import words_of
from pipelines import TextToImage
from pipelines.edit import edit, psnr
from pipelines.images import to_tensor
from pipelines.png import read_settings
from pipelines.request import Request
from tests.small_pipeline import WINDOW

FEW = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 7, "scheduler": "ddim"}


def words(pipe, prompt):
    return words_of(pipe.model.text.read(prompt), pipe.model.text.window)


def aligned(pipe, source, target):
    return [str(pair) for pair in align(words(pipe, source), words(pipe, target)).pairs]


@pytest.mark.parametrize(
    "source, target, expected",
    [
        ("a cat in a hat", "a dog in a hat", ["a", "cat -> dog", "in", "a", "hat"]),
        ("a Cat", "a cat", ["a", "Cat -> cat"]),
        ("a cat", "a red cat, red", ["a", "+ red", "cat", "+ , red"]),
        ("a big red cat", "a cat", ["a", "- big red", "cat"]),
        ("one red cat", "dog cat", ["one red -> dog", "cat"]),
    ],
)
def test_words_are_aligned_by_words(pipe, source, target, expected):
    assert aligned(pipe, source, target) == expected


@pytest.mark.parametrize(
    "source, target", [("a cat in a hat", "a dog in a hut"), ("one red cat", "cat"), ("cat", "cat")]
)
def test_every_tokens_share_goes_somewhere(pipe, source, target):
    """Words of another number of tokens share their attention out evenly; the sum is kept where no word is left out."""
    before, after = words(pipe, source), words(pipe, target)
    alignment = align(before, after)
    sums = alignment.given_SS.sum(1)
    left_out = [before.numbers(name)[0] for name in ("one", "red") if "one" in source]
    for place, number in enumerate(before.of_S):
        assert sums[place].item() == pytest.approx(0 if number in left_out else 1)
    assert not alignment.added_S.any()
    if source == target:
        assert torch.equal(alignment.given_SS, torch.eye(WINDOW))


def test_shares_of_equal_pieces():
    torch.testing.assert_close(shared(1, 3), torch.full((1, 3), 1 / 3))
    torch.testing.assert_close(shared(3, 1), torch.ones(3, 1))
    torch.testing.assert_close(shared(2, 3), torch.tensor([[2, 1, 0], [0, 1, 2]]) / 3)
    assert torch.equal(shared(5, 5), torch.eye(5))


def maps_after(alignment, scale_S, bias=()):
    """Weights by which the target's values are multiplied, L N S, and those of both alone, from a random layer: values
    that are the identity show them."""
    S = len(scale_S)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 2, 6, S, generator=generator), torch.randn(4, 2, S, S, generator=generator)
    v = torch.eye(S).expand(4, 2, S, S)
    site = Site("", True, 0, Attention(2 * S, 2))
    out = inject_cross(alignment, scale_S)(site, Attention.attend, q, k, v, *bias)
    alone = site.layer.weights(q, k, *bias)
    assert torch.allclose(out[:3], alone[:3], atol=1e-6)  # all rows but the target's are as they were
    return out[3], alone[2], alone[3]


def test_shared_words_have_the_sources_maps_and_added_ones_their_own(pipe):
    before, after = words(pipe, "a cat in a hat"), words(pipe, "a hut in red a dog")
    alignment = align(before, after)
    scale_S = torch.ones(WINDOW)
    scale_S[after.tokens(*after.numbers("in"))] = 2.5
    bias = (torch.randn(4, 1, 1, WINDOW, generator=torch.Generator().manual_seed(1)),)
    found, source, target = maps_after(alignment, scale_S, bias)

    def share(maps, of, name, which=0):
        return maps[..., of.tokens(of.numbers(name)[which])].sum(-1)

    for one, other in (("a", "a"), ("cat", "hut"), ("hat", "dog"), ("<start>", "<start>"), ("<padding>", "<padding>")):
        torch.testing.assert_close(share(found, after, other), share(source, before, one))
    torch.testing.assert_close(share(found, after, "a", 1), share(source, before, "a", 1))
    torch.testing.assert_close(share(found, after, "red"), share(target, after, "red"))
    torch.testing.assert_close(share(found, after, "in"), 2.5 * share(source, before, "in"))
    hut = after.tokens(*after.numbers("hut"))
    assert len(hut) == 3
    torch.testing.assert_close(found[..., hut[0]], found[..., hut[2]])


def drawn_together(pipe, prompts, **options):
    """Both prompts in one batch from the same noise, without any of our code for edits."""
    plan = pipe.plan(Request(prompts, **options))
    plan.seeds[1] = plan.seeds[0]
    return [*pipe.run(plan)][-1].result().pixels_BCHW


@pytest.mark.parametrize("scheduler", ["heun", "euler_ancestral", "ddpm"])
def test_without_injection_the_target_is_as_alone_and_equal_prompts_are_equal(pipe, scheduler):
    options = {**FEW, "scheduler": scheduler}
    made = edit(pipe, "a red cat", "a red dog", 0.0, 0.0, **options)
    assert torch.equal(made.pixels_BCHW, drawn_together(pipe, ["a red cat", "a red dog"], **options))
    alone = pipe("a red dog", **options).pixels_BCHW[0]
    assert (made.pixels_BCHW[1] - alone).abs().max() < 1e-4  # to rounding: there it is a batch of its own
    injected = edit(pipe, "a red cat", "a red dog", **options).pixels_BCHW
    assert (injected[0] - made.pixels_BCHW[0]).abs().max() < 1e-4  # the source is as ever
    assert (injected[1] - alone).abs().max() > 1e-4
    same = edit(pipe, "a red cat", "a red cat", 1.0, 1.0, **options).pixels_BCHW
    assert (same[0] - same[1]).abs().max() < 1e-5


def test_maps_are_the_sources_in_the_steps_asked_for(pipe):
    """Of 4 steps, 2 with the source's attention to the text and 1 with its attention to itself."""
    places, found = sites(pipe.model.unet), []

    def attend(site, usual, q, k, v, *bias):
        found.append((site.cross, *(torch.equal(x[-2], x[-1]) for x in (q, k))))
        return usual(q, k, v, *bias)

    with attending(places, attend):
        edit(pipe, "a red cat", "a red dog", 0.5, 0.25, **FEW)
    steps = [found[i : i + len(places)] for i in range(0, len(found), len(places))]
    assert len(steps) == 4
    for number, step in enumerate(steps):
        for cross, q, k in step:
            assert (q and k) or number >= (2 if cross else 1)
            assert not (cross and k) or number < 2


def test_weights_change_the_target_alone_and_1_changes_nothing(pipe):
    plain, same, more = (
        edit(pipe, "a red cat", "a red cat", weights=w, **FEW).pixels_BCHW for w in (None, {"red": 1}, {"RED": 3})
    )
    assert torch.equal(plain, same)
    assert torch.equal(more[0], plain[0])
    assert (more[1] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 1}, {"negative_prompt": "a red dog " * WINDOW}, {"excite": ["red"]}]
)
def test_it_goes_with_other_options(pipe, options):
    made = edit(pipe, "a (red:1.5) cat", "a red dog", weighting="attention", **FEW | options)
    assert made.pixels_BCHW.isfinite().all()
    assert [settings["seed"] for settings in made.settings] == [7, 7]


@pytest.mark.parametrize(
    "prompts, options, says",
    [
        (("a cat", "dog red"), {}, "no word in common: a -> dog, cat -> red"),
        (("", ""), {}, "no words"),
        (("cat", "cat " * WINDOW), {}, "the source takes 1 windows of the text encoder, the target 2"),
        (("a cat", "a dog"), {"weights": {"cat": 2}}, "'cat' is not a word of this prompt, whose words are 'a', 'dog'"),
        (("a cat", "a dog"), {"weights": {"dog": math.nan}}, "the weight of 'dog' is nan"),
        (("a cat", "a dog"), {"weights": ["dog"]}, "weights is ['dog']"),
        (("a cat", "a dog"), {"weights": {1: 2}}, "weights is {1: 2}"),
        (("a cat", "a dog"), {"cross_steps": 1.5}, "cross_steps is 1.5"),
        (("a cat", "a dog"), {"self_steps": -0.1}, "self_steps is -0.1"),
        (("a cat", "a dog"), {"num_images": 2}, "num_images is 2"),
        (("a cat", "a dog"), {"image": Image.new("RGB", (32, 32)), "strength": 0.5}, "strength was given"),
        (("a cat", "a dog"), {"word_maps": True}, "word_maps or pixel_maps was given"),
        (("a cat", "a dog"), {"rounds": 1.5}, "rounds is 1.5"),
        (("a cat", "a dog"), {"resolution": "32"}, "resolution is '32'"),
        (("a cat", "a dog"), {"image": "nowhere.png"}, "nowhere.png cannot be read"),
    ],
)
def test_bad_input_is_named(pipe, prompts, options, says):
    with pytest.raises(GazeError) as error:
        edit(pipe, *prompts, **FEW | options)
    assert says in error.value.problem
    assert error.value.hint or "word" in says
    assert not any("attend" in vars(site.layer) for site in sites(pipe.model.unet))


def test_a_model_without_attention_to_the_text_is_named(pipe, monkeypatch):
    monkeypatch.setattr("pipelines.edit.sites", lambda unet, cross: [])
    with pytest.raises(GazeError, match="an edit needs attention to the text"):
        edit(pipe, "a cat", "a dog", **FEW)


def test_a_real_picture_comes_back():
    """By a model that knows what pictures look like: the shipped one."""
    pipe = TextToImage.from_pretrained()
    picture = pipe("red heart", num_inference_steps=5, seed=0).images[0]
    few, many = (
        edit(pipe, "red heart", "blue heart", image=picture, rounds=rounds, num_inference_steps=5) for rounds in (1, 4)
    )
    assert many.psnr["autoencoder"] > few.psnr["autoencoder"] + 3
    assert many.psnr["autoencoder"] > 33
    assert many.psnr["picture"] == pytest.approx(psnr(many.pixels_BCHW[:1], to_tensor(picture)))
    assert few.source.size == picture.size


def test_the_command(gaze, model):
    words = ["edit", "a red cat", "a red dog", "--model", model, "--steps", 2, "--seed", 1]
    code, out, err = gaze(*words, "--weight", "dog:1.5", "-o", "both.png")
    assert (code, err) == (0, "")
    assert out.splitlines()[:3] == ["a", "red", "cat -> dog"]
    assert out.splitlines()[3].startswith("both.png  seed 1  ")
    noted = read_settings("both.png")["edit"]
    assert (noted["source"], noted["target"], noted["weights"]) == ("a red cat", "a red dog", {"dog": 1.5})
    assert "not of a picture" in gaze("generate", "--like", "both.png")[2]
    code, out, _ = gaze(*words, "--json", "-o", "new/")
    assert [Path(path).name for path in json.loads(out)["paths"]] == ["edit.png", "source.png", "target.png"]
    assert json.loads(out)["alignment"][2] == {"source": ["cat"], "target": ["dog"]}
    assert all(Path(path).is_file() for path in json.loads(out)["paths"])
    before = Path("new/source.png").read_bytes()
    code, out, _ = gaze(*words, "--init", "new/source.png", "--weighting", "attention", "-o", "new")
    assert "source redrawn: PSNR" in out
    assert Path("new/source.png").read_bytes() == before  # what is in a folder is not overwritten
    assert Path("new/source-2.png").is_file()
    assert gaze(*words, "--weight", "dog")[0] == 2
    assert gaze(*words, "--cross", "2")[0] == 2
    code, out, err = gaze("edit", "cat", "dog", "--model", model)
    assert (code, out) == (1, "")
    assert "cat -> dog" in err
