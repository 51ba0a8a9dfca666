"""The pipeline's own rules: seeds, batches, steps, and what it says about arguments that cannot be met."""

import dataclasses
import warnings

import pytest
import torch

from diffusion.errors import GazeError
from pipelines import TextToImage
from pipelines.images import to_tensor
from tests.small_pipeline import LATENTS, SIZE, WINDOW, small_pipeline

FEW = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 0}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_pipeline().save_pretrained(folder)
    return TextToImage.from_pretrained(folder)


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


def test_what_does_not_fit_the_window_is_reported(pipe):
    long = "x" * (WINDOW - 2) + " red dog"
    with pytest.warns(UserWarning, match="ignored: 'red dog'"):
        result = pipe(long, **FEW)
    assert result.dropped == ["red dog"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe("x" * (WINDOW - 2), **FEW).dropped == []
        assert pipe("cat", negative_prompt=long, **FEW | {"guidance_scale": 1}).dropped == []
    with pytest.warns(UserWarning, match="red dog"):
        assert pipe("cat", negative_prompt=long, **FEW).dropped == ["red dog"]


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
