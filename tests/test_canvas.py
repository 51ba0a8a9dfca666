"""Starting from a picture: what stays, what is refused, what the settings say."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import GazeError
from pipelines.images import to_tensor
from tests.small_pipeline import SIZE

FEW = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 0}


def picture(width=SIZE, height=SIZE):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def mask(width=SIZE, height=SIZE):
    levels = np.zeros((height, width), np.uint8)
    levels[:, width // 2 :] = 255
    return Image.fromarray(levels)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize(
    "scheduler", ["euler", "heun", "dpmpp_2m", "unipc", "euler_ancestral", "lcm", "deis", "pndm", "kdpm2_ancestral"]
)
def test_what_the_mask_leaves_out_stays_with_every_method(pipe, scheduler, strength):
    options = {**FEW, "image": picture(), "scheduler": scheduler, "strength": strength}
    *_, last = pipe.steps("cat", mask_image=mask(), **options)
    known_BCHW = last.plan.canvas.pixels_BCHW
    mean_BCHW, deviation_BCHW = pipe.encode(known_BCHW)
    drawn = torch.randn(1, *mean_BCHW.shape[1:], generator=torch.Generator().manual_seed(0))
    end_BCHW = last.step.x_BCHW / (1 + last.sigma**2) ** 0.5
    middle = mean_BCHW.shape[-1] // 2
    kept, painted = slice(0, middle), slice(middle, None)
    torch.testing.assert_close(end_BCHW[..., kept], (mean_BCHW + deviation_BCHW * drawn)[..., kept], atol=1e-5, rtol=0)
    assert (end_BCHW[..., painted] - mean_BCHW[..., painted]).abs().max() > 0.05


def test_strength_says_how_far_the_picture_is_left(pipe):
    *_, gone = pipe.steps("cat", image=picture(), strength=1, **FEW)
    far = []
    for strength in (0.25, 0.5, 0.75):
        previews = list(pipe.steps("cat", image=picture(), strength=strength, **FEW))
        assert [preview.total for preview in previews] == [int(4 * strength)] * int(4 * strength)
        far.append((previews[-1].step.x_BCHW - gone.step.x_BCHW).square().mean().item())
    assert far[0] > far[1] > far[2] > 0


def test_each_picture_of_a_batch_is_its_own(pipe):
    for options in ({"image": picture(), "strength": 0.5}, {"image": picture(), "mask_image": mask()}):
        together = pipe(["cat", "red dog " * 8, "dog"], **FEW | options)
        for i, prompt in enumerate(["cat", "red dog " * 8, "dog"]):
            alone = pipe(prompt, **FEW | options | {"seed": i})
            assert (alone.pixels_BCHW[0] - together.pixels_BCHW[i]).abs().max() < 1e-4


def test_files_are_opened_and_noted(pipe, tmp_path):
    picture().save(tmp_path / "a.png")
    mask().save(tmp_path / "m.png")
    files = {"image": str(tmp_path / "a.png"), "mask_image": tmp_path / "m.png"}
    result = pipe("cat", **files, **FEW)
    noted = {"image": str(tmp_path / "a.png"), "mask_image": str(tmp_path / "m.png"), "strength": 1.0}
    assert result.settings[0].items() >= noted.items()
    assert torch.equal(pipe(**result.settings[0]).pixels_BCHW, result.pixels_BCHW)
    opened = pipe("cat", image=Image.open(tmp_path / "a.png"), mask_image=mask(), **FEW)
    assert torch.equal(opened.pixels_BCHW, result.pixels_BCHW)
    assert opened.settings[0]["image"] == str(tmp_path / "a.png")
    assert (
        pipe("cat", image=picture(), **FEW).settings[0] | {"image": None, "strength": 0.8}
        == (pipe("cat", image=picture(), **FEW).settings[0])
    )


def test_a_picture_keeps_its_size_as_far_as_the_model_can(pipe):
    assert pipe("cat", image=picture(35, 21), strength=0.5, **FEW).images[0].size == (34, 20)
    plan = next(pipe.steps("cat", image=picture(), strength=0.5, height=20, width=40, **FEW)).plan
    resized = to_tensor(picture().resize((40, 20), Image.Resampling.LANCZOS))
    assert torch.equal(plan.canvas.pixels_BCHW, resized)


def test_what_is_transparent_in_a_mask_stays(pipe):
    clear = Image.new("RGBA", (SIZE, SIZE), (255, 255, 255, 0))
    clear.paste((255, 255, 255, 255), (SIZE // 2, 0, SIZE, SIZE))
    drawn = [pipe("cat", image=picture(), mask_image=given, **FEW).pixels_BCHW for given in (clear, mask())]
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"strength": 0.5}, "strength was given, but no image"),
        ({"mask_image": mask()}, "mask_image was given, but no image"),
        ({"image": picture(), "strength": 0}, "strength is 0"),
        ({"image": picture(), "strength": 1.5}, "strength is 1.5"),
        ({"image": picture(), "strength": float("nan")}, "strength is nan"),
        ({"image": picture(), "strength": True}, "strength is True"),
        ({"image": picture(), "strength": 0.2}, r"(?s)strength 0.2 of 4 steps is no step.*5 steps"),
        ({"image": picture(), "mask_image": mask(16)}, "the mask is 16x32 pixels, the picture 32x32"),
        ({"image": picture(), "width": 33}, "width is 33"),
        ({"image": picture(1, 32)}, "width is 0"),
        ({"image": "nowhere.png"}, "nowhere.png cannot be read as a picture"),
        ({"image": __file__}, "cannot be read as a picture"),
        ({"image": 5}, "image is int"),
        ({"latents": np.zeros((1, 4, 16, 16))}, "latents are ndarray"),
        ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, "latents have values"),
        ({"original_size": (1, 1)}, "not told sizes"),
    ],
)
def test_bad_arguments_are_refused_at_once(pipe, options, says):
    with pytest.raises(GazeError, match=says):
        pipe.steps("cat", **FEW | options)
