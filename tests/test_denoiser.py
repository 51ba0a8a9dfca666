"""The denoiser against the same arithmetic done plainly, and how often it computes what."""

import math

import pytest
import torch

from diffusion import UNet, UNetConfig
from diffusion.condition import Condition, join
from diffusion.denoiser import Denoiser
from diffusion.guidance import Guidance, classifier_free, projected, rescaled
from diffusion.noise import PREDICTION_TYPES, NoiseSchedule, scaling
from diffusion.samplers import SAMPLERS

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PICTURES = 3


class LinearNet:
    """The interface of a U-Net: output = x * shift + mean of the context, one row per row of the context."""

    def __init__(self):
        self.rows, self.projections, self.embeddings = [], 0, []

    def project_context(self, context_BSE, weight_BS=None):
        self.projections += 1
        return context_BSE.mean(dim=(1, 2))[:, None, None, None]

    def embed_time(self, timestep_B, vector_BV=None):
        self.embeddings.append(timestep_B.tolist())
        shift_BC = (timestep_B / 1000).float()[:, None]
        return [shift_BC if vector_BV is None else shift_BC + vector_BV]

    def denoise(self, x_BCHW, shifts, texts):
        self.rows.append(len(texts))
        x_RCHW = x_BCHW.repeat(len(texts) // len(x_BCHW), 1, 1, 1)
        return x_RCHW * shifts[0][:, :, None, None] + texts


def schedule(prediction_type="epsilon"):
    return NoiseSchedule.from_config({**LATENT, "prediction_type": prediction_type})


def condition(rows, seed=0, width=6, vector=None):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(rows, 5, width, generator=generator)
    return Condition(context, None if vector is None else torch.randn(rows, vector, generator=generator))


def real_unet(vector=None):
    torch.manual_seed(0)
    kind = None if vector is None else "text_time"
    return UNet(UNetConfig(
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=6,
        norm_num_groups=4, addition_embed_type=kind, projection_class_embeddings_input_dim=vector,
    )).eval()  # fmt: skip


def picture(channels=4):
    return torch.randn(PICTURES, channels, 8, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("vector", [None, 7])
@pytest.mark.parametrize("empty_rows", [1, PICTURES])
@torch.no_grad()
def test_guided_equals_two_plain_calls(prediction_type, vector, empty_rows):
    unet, levels = real_unet(vector), schedule(prediction_type)
    positive, negative = condition(PICTURES, 0, vector=vector), condition(empty_rows, 1, vector=vector)
    sigmas = torch.tensor([3.0, 0.7, 0.0], dtype=torch.float64)
    denoise = Denoiser(unet, levels, positive, negative, Guidance(7.5), sigmas)
    for sigma in (3.0, 0.7, 1.234):  # the last is not among the levels announced
        x = picture() * math.hypot(1, sigma)
        c_skip, c_out, c_in = scaling(prediction_type, torch.tensor(sigma, dtype=torch.float64))
        timestep = levels.timestep(torch.tensor([sigma])).expand(PICTURES)
        halves = [
            unet(c_in * x, timestep, prompt.expand(PICTURES).context_BSE, prompt.expand(PICTURES).vector_BV)
            for prompt in (negative, positive)
        ]
        expected = c_skip * x + c_out * (halves[0] + 7.5 * (halves[1] - halves[0]))
        clean = denoise(x, sigma)
        assert clean.dtype == torch.float32
        torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vector", [None, 7])
@torch.no_grad()
def test_pictures_do_not_depend_on_the_batch(vector):
    unet, levels = real_unet(vector), schedule()
    prompts, empty = condition(PICTURES, 0, vector=vector), condition(1, 1, vector=vector)
    x = picture()
    together = Denoiser(unet, levels, prompts, empty, Guidance(5.0))(x, 1.0)
    for i in range(PICTURES):
        vector_1V = None if vector is None else prompts.vector_BV[i : i + 1]
        one = Condition(prompts.context_BSE[i : i + 1], vector_1V)
        torch.testing.assert_close(Denoiser(unet, levels, one, empty, Guidance(5.0))(x[i : i + 1], 1.0)[0], together[i],
                                   rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize(("empty", "scale", "rows"), [(None, 7.5, 1), (True, 1.0, 1), (True, 7.5, 2), (True, 0.0, 2)])
def test_guidance_off_costs_one_batch(empty, scale, rows):
    net = LinearNet()
    negative = condition(1, 1) if empty else None
    Denoiser(net, schedule(), condition(PICTURES), negative, Guidance(scale))(picture(), 1.0)
    assert net.rows == [rows * PICTURES]


def test_no_weight_on_the_empty_prompt_at_scale_one():
    net, x = LinearNet(), picture()
    guided = Denoiser(net, schedule(), condition(PICTURES), condition(1, 1), Guidance(1.0))(x, 2.0)
    assert torch.equal(guided, Denoiser(net, schedule(), condition(PICTURES))(x, 2.0))


@pytest.mark.parametrize("vector", [None, 4])
@pytest.mark.parametrize("name", SAMPLERS)
def test_text_and_time_are_computed_once(name, vector):
    net, levels, method = LinearNet(), schedule(), SAMPLERS[name]
    sigmas = method.sigmas(levels, 6)
    prompts, empty = condition(PICTURES, vector=vector), condition(1, 1, vector=vector)
    denoise = Denoiser(net, levels, prompts, empty, Guidance(2.0), sigmas)
    noise = picture
    steps = list(method.run(denoise, noise(), sigmas, noise))
    assert net.projections == 1
    assert len(net.embeddings) == 1
    assert len(net.rows) == method.calls(6)
    assert steps[-1].x_BCHW.isfinite().all()
    timesteps = levels.timestep(sigmas[:-1]).tolist()
    assert net.embeddings[0] == [t for t in timesteps for _ in range(1 if vector is None else 2 * PICTURES)]


def test_rows_of_the_time_table_belong_to_their_prompts():
    net, levels = LinearNet(), schedule()
    prompts, empty = condition(PICTURES, 0, vector=4), condition(PICTURES, 1, vector=4)
    sigmas = [3.0, 1.0, 0.5]
    denoise = Denoiser(net, levels, prompts, empty, Guidance(2.0), sigmas)
    for sigma in sigmas:
        timestep = levels.timestep(torch.tensor([sigma], dtype=torch.float64))
        expected = (timestep / 1000).float() + join([empty, prompts]).vector_BV
        assert torch.equal(denoise.both.shifts[sigma][0], expected)


def test_outside_the_interval_the_prompt_is_alone_at_half_the_cost():
    net, levels = LinearNet(), schedule()
    prompts, empty, x = condition(PICTURES), condition(1, 1), picture()
    sigmas = [9.0, 5.0, 1.0, 0.2, 0.1, 0.0]
    denoise = Denoiser(net, levels, prompts, empty, Guidance(3.0, interval=(0.2, 5.0)), sigmas)
    alone, guided = Denoiser(net, levels, prompts), Denoiser(net, levels, prompts, empty, Guidance(3.0))
    for sigma, inside in zip(sigmas[:-1], (False, True, True, False, False), strict=True):
        net.rows.clear()
        clean = denoise(x, sigma)
        assert net.rows == [PICTURES * (1 + inside)]
        assert torch.equal(clean, (guided if inside else alone)(x, sigma))


def test_rescale_acts_on_the_networks_output():
    net, levels, x = LinearNet(), schedule("v_prediction"), picture()
    prompts, empty = condition(PICTURES), condition(1, 1)
    clean = Denoiser(net, levels, prompts, empty, Guidance(6.0, rescale=0.7))(x, 2.0)
    c_skip, c_out, c_in = scaling("v_prediction", torch.tensor(2.0, dtype=torch.float64))
    shifts = net.embed_time(levels.timestep(torch.tensor([2.0])))
    uncond, cond = (
        net.denoise(c_in * x, shifts, net.project_context(c.expand(PICTURES).context_BSE)) for c in (empty, prompts)
    )
    expected = rescaled(classifier_free(uncond, cond, 6.0), cond, 0.7)
    torch.testing.assert_close(clean, c_skip * x + c_out * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_projected_guidance_acts_on_clean_pictures_and_sums_differences(prediction_type):
    net, levels = LinearNet(), schedule(prediction_type)
    prompts, empty = condition(PICTURES), condition(1, 1)
    denoise = Denoiser(net, levels, prompts, empty, Guidance(4.0, projected=True, eta=0.3, norm=2.0, momentum=-0.5))
    positive, negative = Denoiser(net, levels, prompts), Denoiser(net, levels, empty.expand(PICTURES))
    running = 0.0
    for seed, sigma in enumerate((8.0, 3.0, 0.5)):
        x = picture() * (1 + seed)
        cond = positive(x, sigma)
        running = cond - negative(x, sigma) - 0.5 * running
        torch.testing.assert_close(denoise(x, sigma), projected(cond, running, 4.0, 0.3, 2.0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_low_precision_network_keeps_the_picture_in_fp32():
    unet, prompts = real_unet().bfloat16(), condition(PICTURES)
    half = Condition(prompts.context_BSE.bfloat16())
    clean = Denoiser(unet, schedule("v_prediction"), half, None)(picture(), 1.0)
    exact = Denoiser(real_unet(), schedule("v_prediction"), prompts, None)(picture(), 1.0)
    assert clean.dtype == torch.float32
    assert (clean - exact).abs().max() < 0.05
