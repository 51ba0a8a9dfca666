"""The U-Net's config is read strictly, and its work on text and on time alone is separable."""

import dataclasses
import inspect

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusion import GazeError, UNet, UNetConfig
from diffusion.attention import Attention
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.recompute import recompute

SMALL = UNetConfig(
    block_out_channels=(16, 32, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(1, 2, 4),
    cross_attention_dim=12,
    norm_num_groups=8,
)
WITH_VECTOR = dataclasses.replace(
    SMALL, addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=10
)
READ = {field.name: field.default for field in dataclasses.fields(UNetConfig) if field.name not in UNetConfig.OWN}
OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    if name != "self"
}
OTHER_VALUES = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 0.5}


def small_unet(config=SMALL):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet(config).eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_option_of_diffusers_is_read_or_fixed_or_ignored():
    sets = [READ.keys(), UNetConfig.FIXED.keys(), UNetConfig.IGNORED.keys()]
    assert set().union(*sets) == OPTIONS.keys()
    assert sum(map(len, sets)) == len(OPTIONS)  # none in two sets
    assert all(reason for reason in UNetConfig.IGNORED.values())


def test_an_option_left_out_has_diffusers_value():
    assert {name: OPTIONS[name] for name in READ | UNetConfig.FIXED} == READ | UNetConfig.FIXED
    assert UNetConfig.from_diffusers({}) == UNetConfig()


@pytest.mark.parametrize("option", UNetConfig.FIXED)
def test_a_fixed_option_takes_no_other_value(option):
    value = UNetConfig.FIXED[option]
    UNetConfig.from_diffusers({option: value})
    other = OTHER_VALUES.get(type(value), lambda value: "something else")(value)
    with pytest.raises(GazeError, match=option) as error:
        UNetConfig.from_diffusers({option: other})
    assert repr(other) in str(error.value)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("block_out_chanels", [32], "block_out_channels"),
        ("_class_name", "UNet2DModel", "not a UNet2DConditionModel"),
        ("down_block_types", ["AttnDownBlock2D"] * 4, "CrossAttnDownBlock2D"),
        ("up_block_types", ["UpBlock2D"] * 3, "4 block_out_channels"),
        ("layers_per_block", [1, 2], "4 block_out_channels"),
        ("layers_per_block", 0, "at least 1"),
        ("attention_head_dim", 7, "number of heads"),
        ("attention_head_dim", [8, 8, 8, 7], "number of heads"),
        ("norm_num_groups", 48, "must divide"),
        ("addition_embed_type", "text", "only text_time"),
        ("addition_embed_type", "text_time", "width of its vector"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(option, value, says):
    with pytest.raises(GazeError) as error:
        UNetConfig.from_diffusers({option: value})
    assert says in str(error.value)
    assert option in str(error.value) or option in ("_class_name", "norm_num_groups", "addition_embed_type")


def test_config_comes_back_from_what_it_wrote():
    for config in (UNetConfig(), SMALL, WITH_VECTOR):
        assert UNetConfig.from_diffusers(config.to_diffusers()) == config
    assert OPTIONS.keys() - UNetConfig.IGNORED.keys() < SMALL.to_diffusers().keys()


@pytest.mark.parametrize("config", [SMALL, WITH_VECTOR], ids=["plain", "vector"])
def test_text_and_time_are_separable(config):
    unet = small_unet(config)
    x, context, timestep = randn(2, 4, 9, 7), randn(2, 5, 12, seed=1), torch.tensor([3.5, 900.0])
    vector = None if config is SMALL else randn(2, 10, seed=2)
    expected = unet(x, timestep, context, vector)
    texts = unet.project_context(context)
    assert torch.equal(unet.denoise(x, unet.embed_time(timestep, vector), texts), expected)
    for i, number in enumerate(timestep.tolist()):
        row = None if vector is None else vector[i : i + 1]
        shifts = unet.embed_time(number, row)
        close(unet.denoise(x[i : i + 1], shifts, [(k[i : i + 1], v[i : i + 1]) for k, v in texts]), expected[i : i + 1])


def test_time_shifts_can_be_tabulated():
    unet = small_unet()
    table = unet.embed_time(torch.linspace(0, 999, 7))
    for shift, single in zip(table, unet.embed_time(999.0), strict=True):
        assert shift.shape == (7, single.shape[1])
        close(shift[6:], single)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_guidance_pair_shares_what_comes_before_the_text(batch):
    for config in (SMALL, dataclasses.replace(SMALL, down_block_types=("CrossAttnDownBlock2D",) * 3)):
        unet = small_unet(config)
        x, context = randn(batch, 4, 9, 7), randn(2 * batch, 5, 12, seed=1)
        expected = unet(x.repeat(2, 1, 1, 1), 321.0, context)
        rows = []
        unet.conv_in.register_forward_hook(lambda module, args, output, rows=rows: rows.append(len(output)))
        close(unet(x, 321.0, context), expected)
        assert rows == [batch]
        assert (expected[0] - expected[batch]).abs().max() > 1e-3  # the texts differ, and so do the results


def test_the_attention_seam_sees_every_layer_and_leaves_no_trace():
    unet = small_unet()
    x, context = randn(1, 4, 8, 8), randn(1, 5, 12, seed=1)
    expected = unet(x, 10, context)
    seen = []

    def plain(q_BLND, k_BLSD, v_BLSD):
        seen.append(k_BLSD.shape[2])
        scores = q_BLND.double() @ k_BLSD.double().transpose(-1, -2) / q_BLND.shape[-1] ** 0.5
        return (scores.softmax(-1) @ v_BLSD.double()).float()

    layers = [module for module in unet.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.attend = plain
    close(unet(x, 10, context), expected)
    assert len(seen) == len(layers)
    assert seen.count(5) == len(layers) // 2  # half of the layers look at the text
    for layer in layers:
        del layer.attend
    assert torch.equal(unet(x, 10, context), expected)


def test_trains_under_autocast():
    unet = small_unet().train()
    x, context, timestep = randn(2, 4, 8, 8), randn(2, 5, 12, seed=1), torch.tensor([0.25, 998.5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = unet(x, timestep, context)
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in unet.parameters())
    expected = unet(x, timestep, context)
    assert (output - expected).abs().max() < 0.05 * expected.abs().max()


def test_zero_residuals_starts_at_zero_and_learns():
    unet = small_unet().zero_residuals()
    output = unet(randn(1, 4, 8, 8), 10, randn(1, 5, 12, seed=1))
    assert not output.any()
    (output - 1).square().mean().backward()
    assert unet.conv_out.weight.grad.any()


def test_a_vector_is_neither_missing_nor_spare():
    x, context, vector = randn(1, 4, 8, 8), randn(1, 5, 12), randn(1, 10)
    with pytest.raises(GazeError, match="needs a vector"):
        small_unet(WITH_VECTOR)(x, 10, context)
    with pytest.raises(GazeError, match="takes no vector"):
        small_unet()(x, 10, context, vector)


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(GazeError, match=r"config\.json"):
        UNet.from_pretrained(tmp_path)
    small_unet().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"cross_attention_dim": 12', '"cross_attention_dim": 13'))
    with pytest.raises(GazeError, match=r"attn2\.to_k\.weight"):
        UNet.from_pretrained(tmp_path)


def test_saved_and_read_gives_the_same_bits(tmp_path):
    unet = small_unet(WITH_VECTOR)
    unet.save_pretrained(tmp_path)
    x, context, vector = randn(1, 4, 8, 8), randn(1, 5, 12, seed=1), randn(1, 10, seed=2)
    read = UNet.from_pretrained(tmp_path)
    assert torch.equal(read(x, 7.5, context, vector), unet(x, 7.5, context, vector))
    assert all(p.requires_grad for p in read.parameters())


def text_encoder():
    config = CLIPTextConfig(vocab_size=20, hidden_size=12, intermediate_size=24, num_hidden_layers=3,
                            num_attention_heads=2, max_position_embeddings=8)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CLIPText(config).initialize()


def gradients(unet, text, x, vector, prepare):
    """Of a loss through both networks, and the bytes that are kept for the way back; the weights' own not counted.
    prepare: is called with each network, and checkpoint's stand-in is in place."""
    weights, kept = {value.data_ptr() for value in [*unet.parameters(), *text.parameters()]}, {}

    def keep(value):
        if isinstance(value, torch.Tensor) and value.data_ptr() not in weights:
            kept[value.data_ptr()] = value.untyped_storage().nbytes()
        return value

    def checkpoint(function, *inputs, **options):  # keeps its inputs where the hooks do not see them
        torch.utils._pytree.tree_map(keep, inputs)
        return torch.utils.checkpoint.checkpoint(function, *inputs, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.recompute.checkpoint", checkpoint)
        prepare(unet)
        prepare(text)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = unet(x, torch.tensor([3.5, 900.0]), text(torch.arange(16).view(2, 8)), vector).square().mean()
    loss.backward()
    return {name: value.grad for net in (unet, text) for name, value in net.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize("config", [SMALL, WITH_VECTOR], ids=["plain", "vector"])
def test_activations_computed_twice_take_less_memory_and_give_the_same_bits(config):
    """Several transformer blocks in a layer; the names of parameters stay."""
    config = dataclasses.replace(config, transformer_layers_per_block=(1, 2, 3))
    x, vector = randn(2, 4, 18, 14), None if config.addition_embed_type is None else randn(2, 10, seed=2)
    expected, whole = gradients(small_unet(config), text_encoder(), x, vector, lambda network: None)
    unet = small_unet(config)
    found, kept = gradients(unet, text_encoder(), x, vector, recompute)
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    assert all(value.any() for value in found.values())
    assert kept < 0.4 * whole
    assert unet.state_dict().keys() == small_unet(config).state_dict().keys()
    with torch.inference_mode():
        assert torch.equal(unet(x, 5.0, randn(2, 8, 12), vector), small_unet(config)(x, 5.0, randn(2, 8, 12), vector))
