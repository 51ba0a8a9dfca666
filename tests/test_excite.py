"""Attend-and-Excite: a named word is attended to more, by the slope that finite differences show."""

import threading

import pytest
import torch

from diffusion import excite
from diffusion.attention import Attention
from diffusion.attention_sites import sites
from diffusion.denoiser import Predictor
from diffusion.errors import GazeError
from diffusion.excite import coarse, strongest
from diffusion.unet import UNet, UNetConfig
from diffusion.words import words_of
from pipelines.request import Request

FEW = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 3, "scheduler": "ddim"}
TOKENS = [[[2], [3, 4]], [[1, 2], [5]]]  # of two pictures, two words each


def exactly(self, q, k):
    return q @ k.mT / q.shape[-1] ** 0.5


def test_the_slope_is_that_of_finite_differences(monkeypatch):
    monkeypatch.setattr(Attention, "scores", exactly)  # in float64, as all the rest
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=6,
        norm_num_groups=4,
    )
    unet = UNet(config).double()
    texts = unet.project_context(3 * torch.randn(2, 7, 6, dtype=torch.float64))
    shifts = unet.embed_time(500.0)
    places = coarse(unet)
    assert [site.level for site in places] == [1] * 4

    def predict(x, sigma):
        return unet.denoise(x, shifts, texts)

    def least(x):
        return strongest(places, predict, x, 1.0, TOKENS).amin(1)

    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(least(x).sum(), x)
    assert slope.abs().amax((1, 2, 3)).min() > 1e-6
    step = 1e-6
    with torch.no_grad():
        for _ in range(5):
            way = torch.randn_like(x)
            found = (least(x + step * way) - least(x - step * way)) / (2 * step)
            torch.testing.assert_close(found, (slope * way).sum((1, 2, 3)), rtol=1e-5, atol=1e-9)


def seen(pipe, prompt, word, **options):
    """The word's strongest attention at each step, at the x that the solver has there."""
    places, found = coarse(pipe.model.unet), []
    words = words_of(pipe.model.text.read(prompt), pipe.model.text.window)

    def around(denoiser, rows):
        def denoise(x, sigma):
            alone = denoiser.alone
            predict = Predictor(alone.unet, alone.schedule, alone.condition, torch.tensor([sigma]), None)
            c_in = denoiser.schedule.scaling(torch.tensor(sigma, dtype=torch.float64)).c_in
            tokens = [[words.tokens(*words.numbers(word))]]
            found.append(strongest(places, predict, c_in * x, sigma, tokens).item())
            return denoiser(x, sigma)

        return denoise

    plan = pipe.plan(Request(prompt, **options))
    *_, last = pipe.run(plan, around)
    return found, last.result().pixels_BCHW


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler_ancestral", "ddpm"])
def test_the_word_is_attended_to_more_at_every_step(pipe, scheduler):
    options = {**FEW, "scheduler": scheduler}
    plain, _ = seen(pipe, "a red cat", "cat", **options)
    more, _ = seen(pipe, "a red cat", "cat", excite=["cat"], **options)
    assert more[0] == plain[0]
    assert all(after > before for before, after in zip(plain[1:], more[1:], strict=True))


def test_off_is_off_and_on_moves_no_other_picture(pipe):
    plain = pipe(["a red cat", "a red dog"], **FEW).pixels_BCHW
    for nothing in (None, [], ()):
        assert torch.equal(pipe(["a red cat", "a red dog"], excite=nothing, **FEW).pixels_BCHW, plain)
    excited = pipe(["a red cat", "a red dog"], excite=["red"], **FEW)
    assert (excited.pixels_BCHW - plain).abs().amax((1, 2, 3)).min() > 1e-3
    assert excited.settings[1]["excite"] == ["red"]
    alone = pipe("a red dog", excite="red", **FEW | {"seed": FEW["seed"] + 1}).pixels_BCHW[0]
    assert (excited.pixels_BCHW[1] - alone).abs().max() < 1e-3
    again = pipe(["a red cat", "a red dog"], **FEW).pixels_BCHW
    assert torch.equal(again, plain)  # nothing stays


def test_a_slope_whose_square_is_0_moves_nothing_far(pipe, monkeypatch):
    plain = pipe("a red cat", **FEW).pixels_BCHW
    monkeypatch.setattr(excite, "strongest", lambda places, predict, x, *_: 1e-25 * x.sum((1, 2, 3))[:, None])
    assert (pipe("a red cat", excite=["cat"], **FEW).pixels_BCHW - plain).abs().max() < 1e-3


def test_it_leaves_no_gradients_and_layers_as_they_were(pipe):
    pipe("a red cat", excite=["cat"], **FEW | {"num_inference_steps": 2})
    assert all(parameter.grad is None for parameter in pipe.model.unet.parameters())
    assert not any("attend" in vars(site.layer) for site in sites(pipe.model.unet))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_threads_do_not_see_each_others(pipe):
    options = FEW | {"num_inference_steps": 3}
    expected = {words: pipe("a red cat", excite=words, **options).pixels_BCHW for words in (None, "cat", "red")}
    found = {}

    def work(words):
        found[words] = pipe("a red cat", excite=words, **options).pixels_BCHW

    threads = [threading.Thread(target=work, args=(words,)) for words in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for words, pixels in expected.items():
        assert (found[words] - pixels).abs().max() < 1e-4


def test_a_prompt_of_several_chunks(pipe):
    assert pipe("a red cat " * 10, excite=["cat"], negative_prompt="dog", **FEW).pixels_BCHW.isfinite().all()


def test_bad_input_is_named(pipe, monkeypatch):
    with pytest.raises(GazeError, match="'hat' is not a word of this prompt, whose words are 'a', 'dog'"):
        pipe(["a hat", "a dog"], excite=["hat"], **FEW)
    with pytest.raises(GazeError, match="excite is"):
        pipe("a hat", excite=[1], **FEW)
    monkeypatch.setattr(excite, "sites", lambda unet, cross: [])
    with pytest.raises(GazeError, match="attention to the text"):
        pipe.steps("a hat", excite=["hat"], **FEW)
