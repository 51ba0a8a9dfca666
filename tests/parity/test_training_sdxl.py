"""The loss of an SDXL fine-tuning step against the mathematics of diffusers' train_text_to_image_sdxl.py: two text
encoders, pooled text, sizes and crops of each picture, dropped captions, min-SNR, through diffusers' U-Net."""

import dataclasses
from typing import NamedTuple

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from diffusion.objective import denoising_loss, min_snr_weight
from diffusion.pretrained import load_model
from tests.narrow_models import narrow_pipeline
from train.told import condition, read, tell


class Sample(NamedTuple):
    caption: str
    dropped: bool
    original: tuple[int, int]
    crop: tuple[int, int]
    size: tuple[int, int]


SAMPLES = [
    Sample("a red cat", False, (480, 640), (0, 11), (32, 32)),
    Sample("", True, (33, 1000), (7, 0), (24, 40)),
    Sample("dog", False, (1024, 1024), (0, 0), (40, 24)),
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def theirs():
    return narrow_pipeline("sdxl")


@pytest.fixture(scope="module")
def ours(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return load_model(folder)


def by_the_script(pipeline, zeros, clean, noise, timesteps, gamma):
    """The script's prompt encoding, time ids, noise and loss, each row on its own."""
    states, pooled = [], None
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        captions = [sample.caption for sample in SAMPLES]
        options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "return_tensors": "pt"}
        outputs = encoder(tokenizer(captions, truncation=True, **options).input_ids, output_hidden_states=True)
        states.append(outputs.hidden_states[-2])
        pooled = outputs[0]
    context = torch.cat(states, dim=-1)
    if zeros:  # as diffusers' pipeline takes no negative prompt
        context[1], pooled[1] = 0, 0
    time_ids = torch.tensor([[*sample.original, *sample.crop, *sample.size] for sample in SAMPLES])
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    output = pipeline.unet(
        scheduler.add_noise(clean, noise, timesteps),
        timesteps,
        context,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
    ).sample
    snr = compute_snr(scheduler, timesteps)
    weight = torch.stack([snr, gamma * torch.ones_like(snr)]).amin(0) / snr
    return (output - noise).square().mean(dim=(1, 2, 3)) * weight


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_the_loss_of_a_step(theirs, ours, zeros):
    model = dataclasses.replace(ours, zeros=zeros)
    clean, noise = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([3, 400, 990])
    expected = by_the_script(theirs, zeros, clean, noise, timesteps, 5.0)
    told = tell(model, SAMPLES, CPU)
    tokens = told.pop("tokens")

    def predict(x, sigma):
        text = condition(model.unet, read([*model.texts.values()], tokens), **told)
        return model.unet(x, model.schedule.timestep(sigma), text.context_BSE, text.vector_BV, text.weight_BS)

    sigma = model.schedule.sigma(timesteps)
    weight = min_snr_weight(sigma, model.schedule)
    loss = denoising_loss(predict, clean, noise, sigma, model.schedule, weight)
    torch.testing.assert_close(loss, expected, rtol=2e-4, atol=0)


@torch.no_grad()
def test_what_is_told_is_what_sampling_tells(ours):
    """A row of training is the same, to rounding, as the same prompt and numbers in the pipeline."""
    told = tell(ours, SAMPLES, CPU)
    text = condition(ours.unet, read([*ours.texts.values()], told.pop("tokens")), **told)
    for row, sample in enumerate(SAMPLES):
        prompt = None if sample.dropped else sample.caption
        alone = ours.encode([prompt], [*sample.original, *sample.crop, *sample.size])
        torch.testing.assert_close(text.context_BSE[row], alone.context_BSE[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(text.vector_BV[row], alone.vector_BV[0], rtol=0, atol=1e-5)
    assert text.weight_BS is None


@pytest.mark.parametrize("field", ["original", "crop", "size"])
def test_each_number_counts_in_its_row_alone(ours, field):
    def vector(samples):
        told = tell(ours, samples, CPU)
        return condition(ours.unet, read([*ours.texts.values()], told.pop("tokens")), **told).vector_BV

    for place in (0, 1):
        numbers = list(getattr(SAMPLES[2], field))
        numbers[place] += 5
        changed = vector([*SAMPLES[:2], SAMPLES[2]._replace(**{field: tuple(numbers)})])
        assert torch.equal(changed[:2], vector(SAMPLES)[:2])
        assert not torch.equal(changed[2], vector(SAMPLES)[2])
