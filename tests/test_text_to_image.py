"""The pipeline's own rules: seeds, batches, steps, and what it says about arguments that cannot be met."""

import dataclasses
import warnings

import pytest
import torch

from diffusion.errors import GazeError
from diffusion.text import MOST_CHUNKS
from pipelines import TextToImage
from pipelines.images import to_tensor
from tests.small_pipeline import LATENTS, SIZE, WINDOW

FEW = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 0}


@pytest.fixture
def calls(pipe, monkeypatch):
    """Rows of the text in each call of the U-Net."""
    rows = []
    denoise = pipe.model.unet.denoise

    def counted(x_BCHW, shifts, texts):
        rows.append(len(texts[0][0]))
        return denoise(x_BCHW, shifts, texts)

    monkeypatch.setattr(pipe.model.unet, "denoise", counted)
    return rows


def difference(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("scheduler", ["euler", "euler_ancestral"])
def test_a_seed_gives_the_same_picture_in_any_batch(pipe, scheduler):
    prompts = ["a red cat", "dog", "red"]
    together = pipe(prompts, scheduler=scheduler, **FEW | {"seed": 7})
    assert together.seeds == [7, 8, 9]
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, scheduler=scheduler, **FEW | {"seed": 7 + i})
        assert difference(alone.pixels_BCHW[0], together.pixels_BCHW[i]) < 1e-4
    several = pipe("dog", num_images=3, scheduler=scheduler, **FEW | {"seed": 7})
    assert difference(several.pixels_BCHW[1], together.pixels_BCHW[1]) < 1e-4
    assert difference(several.pixels_BCHW[1], several.pixels_BCHW[2]) > 0.01


def test_pictures_are_counted_over_prompts_first(pipe):
    result = pipe(["cat", "dog"], negative_prompt=["dog", "cat"], num_images=2, **FEW)
    assert result.seeds == [0, 1, 2, 3]
    assert [s["prompt"] for s in result.settings] == ["cat", "cat", "dog", "dog"]
    assert [s["negative_prompt"] for s in result.settings] == ["dog", "dog", "cat", "cat"]


def test_settings_make_the_picture_again(pipe):
    first = pipe(["cat", "dog"], scheduler="heun", negative_prompt="red", **FEW | {"seed": 3})
    again = pipe(**first.settings[1])
    assert again.settings == [first.settings[1]]
    assert difference(again.pixels_BCHW[0], first.pixels_BCHW[1]) < 1e-4


def test_images_are_the_pixels(pipe):
    result = pipe("cat", **FEW)
    assert result.images[0].size == (SIZE, SIZE)
    assert difference(to_tensor(result.images), result.pixels_BCHW.clamp(-1, 1)) <= 1 / 255 + 1e-6


def test_no_seed_draws_one_and_reports_it(pipe):
    first, second = (pipe("cat", **FEW | {"seed": None}) for _ in range(2))
    assert first.seeds != second.seeds
    assert difference(pipe("cat", **FEW | {"seed": first.seeds[0]}).pixels_BCHW, first.pixels_BCHW) < 1e-4


def test_start_noise_replaces_that_of_the_seed(pipe):
    noise = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(5))
    given = pipe("cat", latents=noise, **FEW)
    assert difference(given.pixels_BCHW, pipe("cat", **FEW | {"seed": 5}).pixels_BCHW) < 1e-4


def test_the_empty_prompt_is_the_unconditional_picture_at_any_guidance(pipe):
    low, high = (pipe("", **FEW | {"guidance_scale": scale}).pixels_BCHW for scale in (1.0, 9.0))
    assert difference(low, high) < 1e-3
    assert difference(low, pipe("cat", **FEW).pixels_BCHW) > 0.01


def test_guidance_costs_a_second_batch_only_when_it_is_on(pipe, calls):
    pipe(["cat", "dog"], **FEW)
    assert calls == [4] * 4
    calls.clear()
    pipe(["cat", "dog"], **FEW | {"guidance_scale": 1})
    assert calls == [2] * 4


def test_text_and_time_are_worked_out_once(pipe, monkeypatch):
    count = {"embed_time": 0, "project_context": 0}

    def count_calls(name):
        original = getattr(pipe.model.unet, name)

        def counted(*args):
            count[name] += 1
            return original(*args)

        monkeypatch.setattr(pipe.model.unet, name, counted)

    for name in count:
        count_calls(name)
    pipe("cat", **FEW)
    assert count == {"embed_time": 1, "project_context": 1}


def test_steps_show_the_way_and_end_with_the_result(pipe, calls):
    previews = list(pipe.steps("cat", num_images=2, scheduler="euler", **FEW))
    assert [(p.index, p.total) for p in previews] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [p.sigma for p in previews] == sorted((p.sigma for p in previews), reverse=True)
    assert [image.size for image in previews[1].images()] == [(SIZE, SIZE)] * 2
    whole = pipe("cat", num_images=2, scheduler="euler", **FEW)
    assert torch.equal(previews[-1].result().pixels_BCHW, whole.pixels_BCHW)
    assert [image.tobytes() for image in previews[-1].images()] == [image.tobytes() for image in whole.images]


def test_steps_can_be_left_early_and_run_side_by_side(pipe, calls):
    whole = pipe("cat", **FEW)
    one, other = pipe.steps("cat", **FEW), pipe.steps("dog", **FEW)
    pairs = list(zip(one, other, strict=True))
    assert torch.equal(pairs[-1][0].result().pixels_BCHW, whole.pixels_BCHW)
    calls.clear()
    next(pipe.steps("cat", **FEW))
    assert len(calls) == 1
    assert not torch.is_inference_mode_enabled()


def test_defaults_are_the_models_then_diffusers(pipe, monkeypatch):
    def settings(**options):
        return next(pipe.steps("cat", seed=0, **options)).plan.settings()[0]

    assert settings() == {
        "prompt": "cat",
        "negative_prompt": "",
        "seed": 0,
        "scheduler": "ddim",
        "num_inference_steps": 50,
        "guidance_scale": 7.5,
        "height": SIZE,
        "width": SIZE,
    }
    defaults = {"num_inference_steps": 3, "guidance_scale": 0.0, "scheduler": "heun"}
    monkeypatch.setattr(pipe.model, "defaults", defaults)
    assert settings().items() >= defaults.items()
    assert settings(guidance_scale=2, scheduler="euler")["guidance_scale"] == 2.0


def test_a_long_prompt_is_read_in_chunks_and_the_rest_reported(pipe):
    inside = WINDOW - 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = pipe("x" * inside + " red dog", **FEW)
        assert difference(long.pixels_BCHW, pipe("x" * inside, **FEW).pixels_BCHW) > 1e-3
        assert long.dropped == []
    too_long = "x" * inside * MOST_CHUNKS + " red dog"
    with pytest.warns(UserWarning, match="ignored: 'red dog'"):
        assert pipe(too_long, **FEW).dropped == ["red dog"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("cat", negative_prompt=too_long, **FEW | {"guidance_scale": 1}).dropped == []


@pytest.mark.parametrize("scheduler", ["ddim", "euler_ancestral"])
def test_a_picture_is_the_same_beside_a_longer_prompt(pipe, scheduler):
    prompts = ["cat", "red " * WINDOW, "dog BREAK red", "red"]
    together = pipe(prompts, scheduler=scheduler, **FEW)
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, scheduler=scheduler, **FEW | {"seed": i})
        assert difference(alone.pixels_BCHW[0], together.pixels_BCHW[i]) < 1e-4


def test_a_weight_of_one_changes_nothing_and_others_do(pipe):
    plain = pipe("a red cat", **FEW).pixels_BCHW
    assert torch.equal(pipe("a (red:1.0) cat", **FEW).pixels_BCHW, plain)
    assert torch.equal(pipe("[(a (red:1) cat:1.1)]", **FEW).pixels_BCHW, plain)
    changed = [difference(pipe(f"a (red:{weight}) cat", **FEW).pixels_BCHW, plain) for weight in (1.05, 1.5, 3)]
    assert 0 < changed[0] < changed[1] < changed[2]


def test_a_weight_moves_a_words_states_between_nothing_and_more(pipe):
    text = pipe.model.text
    context = {w: text.encode([f"a (red:{w}) cat"]).context_BSE[0] for w in (0, 0.5, 1, 2)}
    plain, empty = text.encode(["a red cat"]).context_BSE[0], text.encode([""]).context_BSE[0]
    _, begins = text.tokenizer.split("a red cat")
    red = [1 + i for i, begin in enumerate(begins) if 2 <= begin < 5]
    others = [i for i in range(text.window) if i not in red]
    assert torch.equal(context[1], plain)
    assert torch.equal(context[0][red], empty[red])
    torch.testing.assert_close(context[0.5][red], (plain + empty)[red] / 2)
    torch.testing.assert_close(context[2][red], (2 * plain - empty)[red])
    assert all(torch.equal(states[others], plain[others]) for states in context.values())


def test_guidance_options_reach_the_picture_and_its_settings(pipe):
    plain = pipe("red cat", **FEW)
    for options, noted in (
        ({"guidance_rescale": 0.7}, {"guidance_rescale": 0.7}),
        ({"guidance_interval": (0.5, None)}, {"guidance_interval": [0.5, None]}),
        ({"projected_guidance": True}, {"projected_guidance": True}),
    ):
        other = pipe("red cat", **options, **FEW)
        assert difference(other.pixels_BCHW, plain.pixels_BCHW) > 1e-4
        assert other.settings[0] == plain.settings[0] | noted
        again = pipe(**other.settings[0])
        assert torch.equal(again.pixels_BCHW, other.pixels_BCHW)
    everywhere = pipe("red cat", guidance_interval=(None, None), **FEW)
    assert torch.equal(everywhere.pixels_BCHW, plain.pixels_BCHW)


def test_guidance_outside_its_interval_costs_nothing(pipe, calls):
    pipe("red cat", guidance_interval=(1e6, 1e7), **FEW)
    assert calls == [1] * 4


def test_other_sizes_are_made(pipe):
    result = pipe("cat", height=16, width=42, **FEW)
    assert result.images[0].size == (42, 16)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheduler": "eulr"}, "did you mean 'euler'"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_inference_steps": 1001}, "1001"),
        ({"num_images": 0}, "num_images is 0"),
        ({"num_images": -3}, "num_images is -3"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 1.0}, "seed is 1.0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"height": 33}, r"(?s)height is 33.*32 or 34"),
        ({"width": 0}, "width is 0"),
        ({"width": 1}, r"(?s)width is 1;.*2"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts have 2 negative prompts"),
        ({"negative_prompt": 3}, "negative_prompt is 3"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents are \(1, 4, 8, 8\).*\(1, 4, 16, 16\)"),
        ({"latents": torch.zeros(2, *LATENTS)}, r"latents are \(2, 4, 16, 16\)"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": None}, "prompt is None"),
        ({"prompt": ["a", 3]}, r"prompt is \['a', 3\]"),
    ],
)
@pytest.mark.parametrize("call", [TextToImage.__call__, TextToImage.steps])
def test_bad_arguments_are_refused_at_once(pipe, calls, call, options, says):
    with pytest.raises(GazeError, match=says):
        call(pipe, **{"prompt": "cat"} | FEW | options)
    assert calls == []


def test_a_model_without_a_size_asks_for_one(pipe, monkeypatch):
    monkeypatch.setattr(pipe.model.unet, "config", dataclasses.replace(pipe.model.unet.config, sample_size=None))
    with pytest.raises(GazeError, match=r"no height was given"):
        pipe("cat", width=32, **FEW)
    monkeypatch.setattr(pipe.model.unet, "config", dataclasses.replace(pipe.model.unet.config, sample_size=(8, 10)))
    assert pipe("cat", **FEW).images[0].size == (20, 16)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(GazeError, match="nowhere"):
        TextToImage.from_pretrained(tmp_path / "nowhere")
