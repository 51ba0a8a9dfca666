"""Padding hidden from cross-attention, against diffusers' encoder_attention_mask; and that nothing changes without."""

import json

import pytest
import torch

from diffusion.pretrained import load_model, save_model
from pipelines import TextToImage
from tests.parity.test_unet import NARROW, inputs, narrow_pair
from tests.small_pipeline import LATENTS, small_pipeline

FEW = {"num_inference_steps": 4, "guidance_scale": 3.0, "seed": 5, "scheduler": "ddim"}
PROMPTS = ["a red cat", "dog"]


@torch.no_grad()
@pytest.mark.parametrize("name", NARROW)
def test_the_network(name):
    theirs, ours = narrow_pair(name)
    x, timestep, context, vector, added = inputs(name, ours, 3, (9, 7))
    seen = torch.arange(7) < torch.tensor([[2], [7], [5]])
    expected = theirs(x, timestep, context, encoder_attention_mask=seen, **added).sample
    output = ours(x, timestep, context, vector, seen)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    plain = ours(x, timestep, context, vector)
    assert not torch.equal(output[0], plain[0])
    assert torch.equal(ours(x, timestep, context, vector, None), plain)
    hidden = context.masked_fill(~seen[:, :, None], 7.0)
    assert torch.equal(ours(x, timestep, hidden, vector, seen), output)


@pytest.fixture(scope="module")
def theirs():
    return small_pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    theirs.save_pretrained(folder / "plain")
    model = load_model(folder / "plain")
    model.defaults["mask_padding"] = True
    save_model(model, folder / "masked")
    return folder


@torch.no_grad()
def plain_loop(parts, masked):
    """Pixels in about [-1, 1], by diffusers' U-Net with its mask."""
    import diffusers

    scheduler = diffusers.DDIMScheduler.from_config(parts.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(FEW["num_inference_steps"])
    words = parts.tokenizer(["", "", *PROMPTS], padding="max_length", return_tensors="pt")
    context = parts.text_encoder(words.input_ids).last_hidden_state
    lengths = torch.tensor([2, 2, *(len(parts.tokenizer(prompt).input_ids) for prompt in PROMPTS)])
    seen = torch.arange(context.shape[1]) < lengths[:, None]
    x = torch.stack([torch.randn(LATENTS, generator=torch.Generator().manual_seed(5 + i)) for i in range(2)])
    options = {"encoder_attention_mask": seen} if masked else {}
    for timestep in scheduler.timesteps:
        empty, full = parts.unet(torch.cat([x, x]), timestep, context, **options).sample.chunk(2)
        x = scheduler.step(empty + FEW["guidance_scale"] * (full - empty), timestep, x).prev_sample
    return parts.vae.decode(x / parts.vae.config.scaling_factor).sample


@pytest.mark.parametrize("name", ["masked", "plain"])
def test_the_picture_of_a_plain_loop(theirs, folder, name):
    assert json.loads((folder / "masked" / "generation_config.json").read_text()) == {"mask_padding": True}
    pipe = TextToImage.from_pretrained(folder / name)
    found = pipe(PROMPTS, **FEW).pixels_BCHW
    assert (found - plain_loop(theirs, name == "masked")).abs().max() < 1e-4
    assert (found - plain_loop(theirs, name != "masked")).abs().max() > 1e-3


def test_what_is_seen_of_prompts_of_several_chunks(folder):
    model = load_model(folder / "masked")
    text, window = model.text, model.text.window
    long = "word " * window
    readings = text.read(long).chunks
    condition = model.encode([long, "dog", ""])
    seen = condition.weight_BS.unflatten(1, (-1, window))
    assert seen.sum(2)[0].tolist() == [len(chunk.ids) + 2 for chunk in readings]
    assert seen.sum(2)[1].tolist() == [3] + [0] * (len(readings) - 1)
    assert seen.sum(2)[2].tolist() == [2] + [0] * (len(readings) - 1)
    assert seen[1, 0, :3].tolist() == [1, 1, 1]
    assert model.mask_padding
    assert load_model(folder / "plain").encode(["dog"]).weight_BS is None
    # A picture is the same whatever longer prompt is drawn beside it.
    pipe = TextToImage.from_pretrained(folder / "masked")
    beside = pipe(["dog", long], **FEW).pixels_BCHW[0]
    assert (beside - pipe("dog", **FEW).pixels_BCHW[0]).abs().max() < 1e-4
