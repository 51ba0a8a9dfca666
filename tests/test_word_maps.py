"""Word maps: pictures stay the same to the bit, maps are what the attention computed, errors say what there is."""

import math
from itertools import zip_longest

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion import attention_maps
from diffusion.attention_sites import attending, sites
from diffusion.errors import GazeError
from pipelines import TextToImage
from pipelines.word_maps import WordMaps
from tests.narrow_models import narrow_pipeline
from tests.small_pipeline import STRUCTURES, small_pipeline

PICTURE = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
MASK = Image.new("L", (32, 32), "black")
MASK.paste("white", (8, 8, 24, 20))
LONG = "a red cat and a red dog by the sea"  # two chunks of the small window: most words have a token a letter
CASES = {
    "ddim": {},
    "heun": {"scheduler": "heun"},
    "ancestral": {"scheduler": "euler_ancestral"},
    "driven": {"scheduler": "kdpm2"},
    "no guidance": {"guidance_scale": 1},
    "interval": {"guidance_interval": (0.5, 3)},
    "negative": {"negative_prompt": LONG},
    "image to image": {"image": PICTURE, "strength": 0.7},
    "inpainting": {"image": PICTURE, "mask_image": MASK},
    "odd": {"height": 34, "width": 22},
}


def plain(pipe):
    return not any("attend" in vars(site.layer) for site in sites(pipe.model.unet))


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_pictures_are_bit_equal_and_maps_are_shares(pipe, options):
    options = {"num_inference_steps": 3, "seed": 5, **options}
    prompts = ["cat", LONG, ""]
    without = pipe(prompts, **options)
    result = pipe(prompts, **options, word_maps=True, pixel_maps=[(3, 20)])
    assert torch.equal(without.pixels_BCHW, result.pixels_BCHW)
    assert without.settings == result.settings
    assert (without.word_maps, without.pixel_maps) == ([], [])
    assert plain(pipe)
    height, width = result.pixels_BCHW.shape[-2:]
    named = [one.words for one in result.word_maps]
    special = ("<start>", "<end>", "<padding>")
    assert named == [("cat", *special), (*LONG.split(), *special), special]
    for one in result.word_maps:
        assert one.maps.shape == (len(one.words), height, width)
        assert one.maps.dtype == torch.float32
        assert one.maps.min() >= 0
        assert (one.maps.sum(dim=0) - 1).abs().max() <= 1e-5
    for one in result.pixel_maps:
        assert one.maps.shape == (1, height, width)
        assert one.maps.min() >= 0
        assert one.maps.sum().item() == pytest.approx(1, abs=1e-5)


def reference(pipe, captured, words, height, width, rows):
    """Maps from queries and keys, in float64: heads, then layers at the latents' size, then calls. captured: a list of
    (site, q, k) for every call of a layer. rows: of the picture, in each call."""
    total, count = 0, 0
    for site, q_BLND, k_BLSD in captured:
        q_LND, k_LSD = q_BLND[rows].double(), k_BLSD[rows].double()
        tokens_NS = (q_LND @ k_LSD.mT / math.sqrt(q_LND.shape[-1])).exp()
        tokens_NS = (tokens_NS / tokens_NS.sum(-1, keepdim=True)).mean(0)
        maps_WN = torch.stack(
            [tokens_NS[:, [s for s, of in enumerate(words.of_S) if of == w]].sum(-1) for w in range(len(words.names))]
        )
        here = -(-height // 2**site.level), -(-width // 2**site.level)
        total = total + F.interpolate(maps_WN.unflatten(1, here)[None], (height, width), mode="bilinear")[0]
        count += 1
    return total / count


@pytest.mark.parametrize("scheduler, calls", [("ddim", [1, 1, 1]), ("heun", [2, 2, 1])])
def test_maps_are_what_the_attention_computed(pipe, scheduler, calls):
    captured = []

    def note(site, usual, q_BLND, k_BLSD, v_BLSD):
        captured.append((site, q_BLND.clone(), k_BLSD.clone()))
        return usual(q_BLND, k_BLSD, v_BLSD)

    places = sites(pipe.model.unet, cross=True)
    options = {"num_inference_steps": 3, "seed": 5, "scheduler": scheduler, "height": 36, "width": 20}
    with attending(places, note):
        result = pipe("red cat", word_maps=True, map_each_step=True, **options)
    (maps,) = result.word_maps
    assert len(captured) == sum(calls) * len(places)
    each, done = [], 0
    for count in calls:
        part = captured[done * len(places) : (done + count) * len(places)]
        each.append(reference(pipe, part, maps.named, 18, 10, 1))  # row 0 is the negative prompt's
        done += count
    assert maps.steps == (1, 2, 3)
    assert torch.allclose(maps.held_TWHW.double(), torch.stack(each), atol=1e-6)
    assert torch.allclose(maps.held_WHW.double(), torch.stack(each).mean(0), atol=1e-6)
    shown = F.interpolate(torch.stack(each).mean(0)[None], (36, 20), mode="bilinear")[0]
    assert torch.allclose(maps.maps.double(), shown, atol=1e-6)
    assert torch.allclose(maps.step(2).double(), F.interpolate(each[1][None], (36, 20), mode="bilinear")[0], atol=1e-6)
    assert torch.equal(maps.word("CAT"), maps.maps[1])


def test_layers_steps_and_heads_can_be_chosen(pipe):
    options = {"num_inference_steps": 3, "seed": 5, "word_maps": True}
    names = [site.name for site in sites(pipe.model.unet, cross=True)]

    def held(**more):
        return pipe("red cat", **options, **more).word_maps[0].held_WHW

    everything = held()
    by_layer = torch.stack([held(map_layers=[name]) for name in names])
    assert torch.allclose(by_layer.mean(0), everything, atol=1e-6)
    assert not torch.allclose(by_layer[0], everything, atol=1e-3)
    by_head = torch.stack([held(map_heads=[head]) for head in (1, 2)])
    assert torch.allclose(by_head.mean(0), everything, atol=1e-6)
    assert torch.allclose(held(map_heads=[2, 1]), everything, atol=1e-6)
    by_step = torch.stack([held(map_steps=[step]) for step in (1, 2, 3)])
    assert torch.allclose(by_step.mean(0), everything, atol=1e-6)
    assert torch.allclose(held(map_steps=range(2, 4)), by_step[1:].mean(0), atol=1e-6)


def test_company_does_not_change_a_map(pipe):
    options = {"num_inference_steps": 2, "seed": 5, "word_maps": True, "pixel_maps": [(0, 0), (31, 31)]}
    together = pipe(["cat", LONG], num_images=2, **options)
    for index, prompt in enumerate(["cat", "cat", LONG, LONG]):
        alone = pipe(prompt, **{**options, "seed": 5 + index})
        assert together.word_maps[index].words == alone.word_maps[0].words
        assert torch.allclose(together.word_maps[index].maps, alone.word_maps[0].maps, atol=1e-4)
        assert torch.allclose(together.pixel_maps[index].maps, alone.pixel_maps[0].maps, atol=1e-4)


def test_little_memory_makes_the_same_maps(pipe, monkeypatch):
    options = {"num_inference_steps": 2, "seed": 5, "word_maps": True}
    whole = pipe(["cat", "dog"], **options)
    monkeypatch.setattr(attention_maps, "MOST", 100)  # less than one pixel's weights
    parts = pipe(["cat", "dog"], **options)
    for one, other in zip(whole.word_maps, parts.word_maps, strict=True):
        assert torch.allclose(one.maps, other.maps, atol=1e-6)


def test_previews_have_the_maps_so_far(pipe):
    options = {"num_inference_steps": 4, "seed": 5, "word_maps": True, "map_steps": [2, 3], "map_each_step": True}
    previews = list(pipe.steps("red cat", **options))
    assert previews[0].word_maps == []
    assert previews[0].result().word_maps == []
    assert [preview.word_maps[0].steps for preview in previews[1:]] == [(2,), (2, 3), (2, 3)]
    second, last = previews[1].result().word_maps[0], previews[-1].result().word_maps[0]
    assert torch.equal(second.maps, last.step(2))
    assert torch.equal(last.maps, pipe("red cat", **options).word_maps[0].maps)


def test_runs_side_by_side_keep_their_maps_apart(pipe):
    options = {"num_inference_steps": 3, "word_maps": True}
    alone = [pipe("red cat", seed=seed, **options).word_maps[0].maps for seed in (1, 2)]
    runs = zip_longest(*(pipe.steps("red cat", seed=seed, **options) for seed in (1, 2)))
    *_, last = runs
    assert all(torch.equal(preview.word_maps[0].maps, maps) for preview, maps in zip(last, alone, strict=True))
    steps = pipe.steps("red cat", seed=1, **options)
    next(steps)
    assert plain(pipe)  # between two steps as well
    steps.close()
    assert plain(pipe)


def test_the_outermost_sees_what_others_changed(pipe):
    """Maps are of the attention as it is steered, not as it would have been."""
    from pipelines.request import Request

    def around(denoiser, rows):
        def steered(x_BCHW, sigma):
            with attending(sites(pipe.model.unet, cross=True), lambda s, usual, q, k, v: usual(0 * q, k, v)):
                return denoiser(x_BCHW, sigma)

        return steered

    plan = pipe.plan(Request("red cat", num_inference_steps=2, seed=5, word_maps=True))
    *_, last = pipe.run(plan, around)
    (maps,) = last.word_maps
    shares = torch.tensor([maps.named.of_S.count(number) / 16 for number in range(len(maps.words))])
    assert torch.allclose(maps.maps, shares[:, None, None].expand_as(maps.maps), atol=1e-6)


def test_a_weight_inside_attention_shows(pipe):
    """Of one head, layer and step: a token of share p and weight 2 gets 2 p / (1 + p)."""
    (first, *_) = (site.name for site in sites(pipe.model.unet, cross=True))
    only = {"map_layers": [first], "map_steps": [1], "map_heads": [2], "word_maps": True}
    options = {"num_inference_steps": 2, "seed": 5, "weighting": "attention"}
    usual_HW, heavy_HW = (
        pipe(prompt, **options, **only).word_maps[0].held_WHW[0] for prompt in ("red cat", "(red:2) cat")
    )
    assert torch.allclose(heavy_HW, 2 * usual_HW / (1 + usual_HW), atol=1e-5)


def test_excite_draws_the_same_with_maps(pipe):
    options = {"num_inference_steps": 2, "seed": 5, "excite": ["cat"]}
    with_maps = pipe("red cat", **options, word_maps=True, pixel_maps=[(1, 2)])
    assert torch.equal(with_maps.pixels_BCHW, pipe("red cat", **options).pixels_BCHW)
    assert with_maps.word_maps[0].steps == (1, 2)


def test_a_pixels_map_is_its_self_attention(pipe):
    captured = []

    def note(site, usual, q_BLND, k_BLSD, v_BLSD):
        captured.append((site, q_BLND[-1:].clone(), k_BLSD[-1:].clone()))
        return usual(q_BLND, k_BLSD, v_BLSD)

    places = sites(pipe.model.unet, cross=False)
    pixels = [(3, 20), (31, 0)]
    with attending(places, note):
        result = pipe("red cat", num_inference_steps=2, seed=5, pixel_maps=pixels)
    assert result.word_maps == []
    (maps,) = result.pixel_maps
    assert maps.pixels == tuple(pixels)
    total = 0
    for site, q_BLND, k_BLSD in captured:
        side = 16 // 2**site.level
        for number, (x, y) in enumerate(pixels):
            row = y * side // 32 * side + x * side // 32
            scores_LN = (k_BLSD[0].double() @ q_BLND[0, :, row, :, None].double())[..., 0]
            map_HW = (scores_LN / math.sqrt(q_BLND.shape[-1])).softmax(-1).mean(0).view(side, side) * side**2
            wide_HW = F.interpolate(map_HW[None, None], (16, 16), mode="bilinear")[0]
            total = total + F.pad(wide_HW[None], (0, 0, 0, 0, number, len(pixels) - 1 - number), value=0.0)[0]
    assert torch.allclose(maps.held_WHW.double(), total / total.sum((1, 2), keepdim=True), atol=1e-6)
    assert torch.allclose(maps.maps.sum((1, 2)), torch.ones(2), atol=1e-5)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_structures(tmp_path, family):
    narrow_pipeline(family).save_pretrained(tmp_path / "model")
    pipe = TextToImage.from_pretrained(tmp_path / "model")
    options = {"num_inference_steps": 2, "seed": 5, "negative_prompt": LONG}
    without = pipe(["cat", LONG], **options)
    result = pipe(["cat", LONG], **options, word_maps=True, pixel_maps=[(1, 2)])
    assert torch.equal(without.pixels_BCHW, result.pixels_BCHW)
    for one in result.word_maps:
        assert (one.maps.sum(dim=0) - 1).abs().max() <= 1e-5


def test_bfloat16_and_nine_channels(tmp_path):
    pipeline = small_pipeline()
    from diffusers import UNet2DConditionModel

    config = {**pipeline.unet.config, "in_channels": 9, **STRUCTURES["sd1"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(unet=UNet2DConditionModel.from_config(config))
    pipeline.save_pretrained(tmp_path / "model")
    for dtype in (torch.float32, torch.bfloat16):
        pipe = TextToImage.from_pretrained(tmp_path / "model", dtype=dtype)
        options = {"image": PICTURE, "mask_image": MASK, "num_inference_steps": 2, "seed": 5}
        result = pipe(["cat", "dog"], **options, word_maps=True)
        assert torch.equal(pipe(["cat", "dog"], **options).pixels_BCHW, result.pixels_BCHW)
        for one in result.word_maps:
            assert one.maps.dtype == torch.float32
            assert (one.maps.sum(dim=0) - 1).abs().max() <= 1e-5


# Bad input


@pytest.mark.parametrize(
    "options, problem, hint",
    [
        ({"map_layers": ["up_blocks.9.*"]}, "no attention is named 'up_blocks.9.*'", "choices: down_blocks.0.*"),
        ({"map_layers": ["*.attn1"]}, "no attention to the text is among map_layers ['*.attn1']", "'*'"),
        ({"map_layers": []}, "map_layers is []", "a list of texts"),
        ({"map_steps": [1, 4]}, "map_steps has step 4, but this run has 3", "steps from 1 to 3"),
        ({"map_steps": [0]}, "a step of map_steps is 0", "at least 1"),
        ({"map_steps": "1"}, "map_steps is '1'", "a list"),
        ({"map_heads": [3]}, "map_heads has head 3, but down_blocks.0", "heads from 1 to 2"),
        ({"map_heads": [True]}, "a head of map_heads is True", "whole number"),
        ({"word_maps": "yes"}, "word_maps is 'yes'", "True or False"),
        ({"word_maps": False, "map_steps": [1]}, "map_steps was given, but no maps were asked for", "word_maps"),
        ({"word_maps": False, "map_each_step": True}, "map_each_step was given", "word_maps"),
        ({"pixel_maps": [(32, 0)]}, "x of a pixel is 32", "at most 31"),
        ({"pixel_maps": [(0, -1)]}, "y of a pixel is -1", "at least 0"),
        ({"pixel_maps": torch.tensor([[3, 3]])}, "pixel_maps is tensor", "a list"),
        ({"pixel_maps": [3]}, "a pixel of pixel_maps is 3", "two numbers"),
    ],
)
def test_what_cannot_be_recorded(pipe, options, problem, hint):
    with pytest.raises(GazeError) as caught:
        pipe.steps("red cat", **{"word_maps": True, "num_inference_steps": 3, **options})
    assert problem in caught.value.problem
    assert hint in caught.value.hint
    assert plain(pipe)


def test_steps_are_those_that_are_done(pipe):
    with pytest.raises(GazeError, match="map_steps has step 3, but this run has 2"):
        pipe("cat", image=PICTURE, strength=0.5, num_inference_steps=4, word_maps=True, map_steps=[3])


def test_words_and_steps_that_are_not_there(pipe):
    options = {"num_inference_steps": 3, "seed": 5, "word_maps": True}
    (maps,) = pipe("red cat", **options).word_maps
    with pytest.raises(GazeError, match=r"'car' is not a word of this prompt, whose words are 'red', 'cat'"):
        maps.word("car")
    with pytest.raises(GazeError, match=r"the maps of single steps were not kept"):
        maps.step(1)
    (kept,) = pipe("red cat", **options, map_steps=[1, 3], map_each_step=True).word_maps
    with pytest.raises(GazeError, match=r"no maps of step 2 were kept\n.*one of 1, 3"):
        kept.step(2)
    assert repr(kept).startswith("WordMaps(words=('red', 'cat', '<start>'")
    (empty,) = pipe("", **options).word_maps
    assert isinstance(empty, WordMaps)
    with pytest.raises(GazeError, match="'red' is not a word of this prompt, which has no words"):
        empty.word("red")


def test_an_error_inside_leaves_the_unet_as_it_was(pipe, monkeypatch):
    before = pipe("red cat", num_inference_steps=2, seed=5)
    monkeypatch.setattr(attention_maps, "by_word", None)
    with pytest.raises(TypeError):
        pipe("red cat", num_inference_steps=2, seed=5, word_maps=True)
    assert plain(pipe)
    assert torch.equal(pipe("red cat", num_inference_steps=2, seed=5).pixels_BCHW, before.pixels_BCHW)
