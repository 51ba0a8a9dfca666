"""The U-Net holds what diffusers' UNet2DConditionModel holds: names, shapes, outputs, gradients, files."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusion import UNet, UNetConfig

SDXL_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
SDXL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
REFINER_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
REFINER_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
SDXL = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}

# As in the config.json of the published models, with the number of their parameter tensors.
FULL_SIZE = {
    "sd1": ({"sample_size": 64, "cross_attention_dim": 768}, 686),
    "sd2": (
        {
            "sample_size": 96,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        686,
    ),
    "sdxl": (
        SDXL
        | {
            "sample_size": 128,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "down_block_types": SDXL_DOWN,
            "up_block_types": SDXL_UP,
            "transformer_layers_per_block": [1, 2, 10],
            "projection_class_embeddings_input_dim": 2816,
        },
        1680,
    ),
    "refiner": (
        SDXL
        | {
            "sample_size": 128,
            "attention_head_dim": [6, 12, 24, 24],
            "block_out_channels": [384, 768, 1536, 1536],
            "cross_attention_dim": 1280,
            "down_block_types": REFINER_DOWN,
            "up_block_types": REFINER_UP,
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        },
        1220,
    ),
}

NARROW = {
    "sd1": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": 4},
    "sd2": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [2, 4, 8, 8]},
    "sdxl": {"block_out_channels": [32, 64, 64], "attention_head_dim": [1, 2, 8]},
    "refiner": {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [5, 2, 4, 8]},
    # Beyond the published structures: every level differs.
    "uneven": {
        "block_out_channels": [32, 48, 64],
        "attention_head_dim": [5, 3, 8],
        "layers_per_block": [1, 3, 2],
        "transformer_layers_per_block": [1, 2, 1],
        "down_block_types": SDXL_DOWN,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
        "in_channels": 9,
        "out_channels": 3,
    },
}
TEXT_WIDTH, POOLED_WIDTH, SIZE_NUMBERS = 24, 20, {"sdxl": 6, "refiner": 5}


def narrow_pair(name):
    """The same small random model twice: diffusers' and ours."""
    config = (FULL_SIZE[name][0] if name in FULL_SIZE else {}) | NARROW[name]
    config = {"norm_num_groups": 16} | config | {"cross_attention_dim": TEXT_WIDTH}
    if name in SIZE_NUMBERS:
        width = POOLED_WIDTH + 8 * SIZE_NUMBERS[name]
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": width}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = UNet2DConditionModel(**config)
    ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="module", params=NARROW)
def named_pair(request):
    return request.param, *narrow_pair(request.param)


def inputs(name, ours, batch, size):
    """x, timestep, context, vector; and the last as diffusers takes it."""
    noise = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, ours.config.in_channels, *size, generator=noise)
    timestep = torch.rand(batch, generator=noise) * 999  # between two timesteps of the training
    context = torch.randn(batch, 7, TEXT_WIDTH, generator=noise)
    if name not in SIZE_NUMBERS:
        return x, timestep, context, None, {}
    pooled = torch.randn(batch, POOLED_WIDTH, generator=noise)
    numbers = torch.randint(0, 1024, (batch, SIZE_NUMBERS[name]), generator=noise)
    frequencies = 10000.0 ** -(torch.arange(4) / 4)
    angles = numbers[..., None] * frequencies
    vector = torch.cat([pooled, torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)], dim=1)
    return x, timestep, context, vector, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": numbers}}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_of_the_published_models(name):
    config, count = FULL_SIZE[name]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**config)
        ours = UNet(UNetConfig.from_diffusers(dict(theirs.config)))
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert len(expected) == count


@pytest.mark.parametrize("size", [(16, 16), (17, 23)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_outputs_and_gradients(named_pair, batch, size):
    name, theirs, ours = named_pair
    x, timestep, context, vector, added = inputs(name, ours, batch, size)
    results = []
    for net, arguments, options in ((theirs, (), added), (ours, (vector,), {})):
        leaves = [x.clone().requires_grad_(), context.clone().requires_grad_()]
        output = net(leaves[0], timestep, leaves[1], *arguments, **options)
        output = output if isinstance(output, torch.Tensor) else output.sample
        parameters = dict(net.named_parameters())
        wave = torch.arange(output.numel()).reshape(output.shape).sin()  # a gradient for each number of its own
        gradients = torch.autograd.grad((output * wave).sum(), [*leaves, *parameters.values()])
        results.append((output.detach(), dict(zip(["x", "context", *parameters], gradients, strict=True))))
    (expected, expected_gradients), (output, gradients) = results
    assert output.shape == (batch, ours.config.out_channels, *size)
    assert (output - expected).abs().max() < 1e-5 * expected.abs().max()
    for key, gradient in expected_gradients.items():
        assert gradient.abs().max() > 0, key
        assert (gradients[key] - gradient).abs().max() < 1e-4 * gradient.abs().max(), key


def test_files_written_by_diffusers_open_here(tmp_path):
    theirs, ours = narrow_pair("sd2")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder, tolerance in (("whole", 0.0), ("shards", 0.0), ("half", 1e-3)):
        read = UNet.from_pretrained(tmp_path / folder)
        assert read.config == ours.config
        for key, value in ours.state_dict().items():
            torch.testing.assert_close(read.state_dict()[key], value, rtol=tolerance, atol=tolerance / 10, msg=key)


@pytest.mark.parametrize("name", NARROW)
def test_files_written_here_open_in_diffusers(name, tmp_path):
    theirs, ours = narrow_pair(name)
    ours.save_pretrained(tmp_path)
    read, notes = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    for key, value in theirs.state_dict().items():
        assert torch.equal(read.state_dict()[key], value), key
    plain = json.loads(json.dumps({key: theirs.config[key] for key in UNetConfig.FIXED}))
    assert {key: read.config[key] for key in UNetConfig.FIXED} == plain
    assert UNetConfig.from_diffusers(dict(read.config)) == ours.config


def test_timesteps_keep_their_digits_in_half_precision():
    """bfloat16 has eight bits: rounded before the cosines, 998 and 999 would be one timestep."""
    _, ours = narrow_pair("sd1")
    theirs, _ = narrow_pair("sd1")
    x, _, context, _, _ = inputs("sd1", ours, 1, (8, 8))
    expected = [theirs(x, torch.tensor(t), context).sample for t in (998, 999)]
    half = ours.bfloat16()
    found = [half(x.bfloat16(), torch.tensor(t), context.bfloat16()).float() for t in (998, 999)]
    assert (found[0] - expected[0]).abs().max() < 0.05 * expected[0].abs().max()
    assert not torch.equal(found[0], found[1])
