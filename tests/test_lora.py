"""LoRA: added without a change of the model, removed to the bit, and what is broken or foreign is named."""

import copy
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusion.errors import GazeError
from diffusion.lora import add_lora, key_places
from diffusion.unet import UNet, UNetConfig
from pipelines import TextToImage
from tests.narrow_models import UNETS
from tests.random_lora import flat, layers_of, random_lora

PARTS = ("unet", "text_encoder")


@pytest.fixture
def pipe(folder):
    return TextToImage.from_pretrained(folder)


@pytest.fixture
def networks(pipe):
    return {part: pipe.model.modules[part] for part in PARTS}


@pytest.fixture
def lora(networks, tmp_path):
    """Tensors of a file for every layer, and the file."""
    tensors = flat(random_lora(networks, 1))
    save_file(tensors, tmp_path / "lora.safetensors")
    return tensors, tmp_path / "lora.safetensors"


def outputs(networks, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(2, 4, 17, 12, generator=generator).to(dtype)
    context_BSE = torch.randn(2, 7, 32, generator=generator).to(dtype)
    tokens_BS = torch.randint(0, 90, (2, 9), generator=generator)
    return [networks["unet"](x_BCHW, 500, context_BSE), networks["text_encoder"](tokens_BS)]


def same(ones, others):
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def close(ones, others, limit):
    return all((one - other).abs().max() < limit for one, other in zip(ones, others, strict=True))


def merged(networks, *files):
    """Copies in float64 with the products of the matrices in their weights: what a LoRA means."""
    copies = {part: copy.deepcopy(network).double() for part, network in networks.items()}
    for tensors, weight in files:
        for part, network in copies.items():
            for name in layers_of(network):
                matrix = network.get_submodule(name).weight.data
                down, up = (tensors[f"{part}.{name}.lora_{role}.weight"].double() for role in "AB")
                matrix += weight * (up.flatten(1) @ down.flatten(1)).reshape(matrix.shape)
    return copies


def contents(networks):
    return {(p, n): (v.data_ptr(), v.clone()) for p in networks for n, v in networks[p].state_dict().items()}


def unchanged(networks, before):
    now = contents(networks)
    assert now.keys() == before.keys()
    return all(now[name][0] == before[name][0] and torch.equal(now[name][1], before[name][1]) for name in before)


def bare(networks):
    """Nothing is left of any addition."""
    modules = [module for network in networks.values() for module in network.modules()]
    return not any(module._forward_hooks or module._buffers or module._non_persistent_buffers_set for module in modules)


@torch.no_grad()
def test_several_add_up_and_are_removed_to_the_bit(networks, lora, tmp_path):
    tensors, one = lora
    other = flat(random_lora(networks, 2))
    save_file(other, tmp_path / "other.safetensors")
    both, alone = merged(networks, (tensors, 0.8), (other, -0.3)), merged(networks, (other, -0.3))
    before, plain = contents(networks), outputs(networks)
    remove = [add_lora(networks, one, 0.8), add_lora(networks, tmp_path / "other.safetensors", -0.3)]
    assert close(outputs(networks), outputs(both, torch.float64), 1e-5)
    assert not close(outputs(networks), plain, 0.1)
    assert unchanged(networks, before)
    remove[0]()
    assert close(outputs(networks), outputs(alone, torch.float64), 1e-5)
    remove[1]()
    assert same(outputs(networks), plain)
    assert unchanged(networks, before)
    assert bare(networks)


@torch.no_grad()
def test_weight_zero_is_exactly_no_change(networks, lora):
    plain = outputs(networks)
    for weight in (0, 0.0, -0.0):
        add_lora(networks, lora[1], weight)
        assert same(outputs(networks), plain)
        assert bare(networks)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_any_precision(networks, lora, tmp_path, dtype):
    save_file({name: value.to(dtype) for name, value in lora[0].items()}, tmp_path / "file.safetensors")
    rounded = {name: value.to(dtype).float() for name, value in lora[0].items()}
    expected = outputs(merged(networks, (rounded, 1.0)), torch.float64)
    add_lora(networks, tmp_path / "file.safetensors")
    assert close(outputs(networks), expected, 1e-5)


@torch.no_grad()
def test_matrices_of_a_1x1_convolution_may_be_linear_and_the_other_way(networks, lora, tmp_path):
    """Stable Diffusion 1.x projects by convolutions that act on tokens; files hold them either way."""

    def turned(value):
        return value[..., None, None] if value.ndim == 2 else value.flatten(1) if value.shape[2:] == (1, 1) else value

    shapes = {(value.ndim, turned(value).ndim) for value in lora[0].values()}
    assert shapes == {(2, 4), (4, 2), (4, 4)}
    expected = outputs(merged(networks, (lora[0], 1.0)), torch.float64)
    save_file({name: turned(value).contiguous() for name, value in lora[0].items()}, tmp_path / "turned.safetensors")
    add_lora(networks, tmp_path / "turned.safetensors")
    assert close(outputs(networks), expected, 1e-5)


@torch.no_grad()
def test_the_model_may_be_moved_before_and_after(pipe, networks, lora):
    expected = outputs(merged(networks, (lora[0], 0.5)), torch.float64)
    pipe.load_lora(lora[1], 0.25)
    pipe.to(torch.float64)
    pipe.load_lora(lora[1], 0.25)
    assert close(outputs(networks, torch.float64), expected, 1e-6)
    pipe.to(torch.bfloat16)
    assert [value.dtype for value in outputs(networks, torch.bfloat16)] == [torch.bfloat16] * 2
    pipe.to("meta")
    assert all(value.is_meta for network in networks.values() for value in network.buffers())
    pipe.unload_lora()
    assert bare(networks)


def test_gradients_flow_as_through_merged_weights(networks, lora):
    reference = merged(networks, (lora[0], 1.0))["unet"]
    add_lora(networks, lora[1])
    gradients = []
    for unet, dtype in ((networks["unet"], torch.float32), (reference, torch.float64)):
        x_BCHW = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        unet(x_BCHW, 3, torch.ones(1, 5, 32, dtype=dtype)).square().sum().backward()
        gradients.append(x_BCHW.grad)
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[1].abs().max()
    assert not any("lora" in name for name, _ in networks["unet"].named_parameters())


OPTIONS = {"seed": 3, "num_inference_steps": 2}


def test_pictures_name_what_was_loaded_and_come_back_after_it(pipe, lora):
    plain = pipe("red cat", **OPTIONS)
    assert "lora" not in plain.settings[0]
    pipe.load_lora(lora[1], 0.8)
    pipe.load_lora(str(lora[1]), 0)
    result = pipe("red cat", num_images=2, **OPTIONS)
    loaded = [{"path": str(lora[1]), "weight": 0.8}, {"path": str(lora[1]), "weight": 0}]
    assert [json.loads(json.dumps(settings))["lora"] for settings in result.settings] == [loaded] * 2
    assert (result.pixels_BCHW - plain.pixels_BCHW).abs().max() > 0.05
    assert pipe(**result.settings[1]).settings == result.settings[1:]
    pipe.unload_lora()
    again = pipe("red cat", **OPTIONS)
    assert torch.equal(again.pixels_BCHW, plain.pixels_BCHW)
    assert again.settings == plain.settings
    with pytest.raises(GazeError, match=r"the lora asked for is .*lora.safetensors.*, loaded is \[\]"):
        pipe(**result.settings[0])
    pipe.unload_lora()


def test_threads_give_the_pictures_that_one_gives(pipe, lora):
    pipe.load_lora(lora[1])
    alone = [pipe("dog", seed=seed, num_inference_steps=2).pixels_BCHW for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: pipe("dog", seed=i % 4, num_inference_steps=2).pixels_BCHW, range(16)))
    assert all(torch.equal(pixels, alone[i % 4]) for i, pixels in enumerate(made))


# Names


def narrow(family):
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3}
    with torch.device("meta"):
        return UNet(UNetConfig(**kinds, **UNETS[family]))


@pytest.mark.parametrize("family", UNETS)
def test_every_layer_has_keys_of_its_own(family):
    networks = {"unet": narrow(family), "text_encoder": nn.ModuleDict({"a_b": nn.Linear(1, 1)})}
    places = key_places(networks)
    for layer in layers_of(networks["unet"]):
        for key in (f"unet.{layer}.lora_A.weight", f"lora_unet_{layer.replace('.', '_')}.lora_down.weight"):
            assert places[key] == ("unet", layer, "down")
    keys = {}
    for key, place in places.items():
        keys.setdefault(place, []).append(key)
    counts = {layer: len(keys["unet", layer, "up"]) for layer in layers_of(networks["unet"])}
    assert min(counts.values()) >= 10  # none was taken by another layer
    assert "text_encoder.text_model.a_b.lora_B.weight" in places
    assert "lora_te1_text_model_a_b.alpha" in places


# As sd-scripts' SDXL trainer writes them; the right side is read off diffusers' U-Net.
ORIGINAL = {
    "input_blocks_4_1_proj_out": "down_blocks.1.attentions.0.proj_out",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks_8_1_transformer_blocks_9_ff_net_2": "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.2",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_2_1_transformer_blocks_3_attn2_to_v": "up_blocks.0.attentions.2.transformer_blocks.3.attn2.to_v",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_0_emb_layers_1": "up_blocks.1.resnets.2.time_emb_proj",
    "output_blocks_8_0_out_layers_3": "up_blocks.2.resnets.2.conv2",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "out_2": "conv_out",
}


def test_original_names_of_sdxl():
    config = UNetConfig(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    with torch.device("meta"):
        places = key_places({"unet": UNet(config)})
    assert {name: places[f"lora_unet_{name}.lora_up.weight"].layer for name in ORIGINAL} == ORIGINAL


# Bad input


@pytest.fixture(scope="module")
def untouched(folder):
    model = TextToImage.from_pretrained(folder).model
    return {part: model.modules[part] for part in PARTS}


@pytest.fixture
def few(untouched):
    """Tensors for a few layers only, and among them those that tests break."""
    return flat(random_lora(untouched, 1, chosen=lambda layer: layer == "conv_in" or layer.endswith("attn1.to_q")))


QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = f"unet.{QUERY}.lora_A.weight", f"unet.{QUERY}.lora_B.weight"
NOTES = "lora_adapter_metadata"


def refusal(networks, path, weight=1.0):
    begin = time.process_time()
    with pytest.raises(GazeError) as error:
        add_lora(networks, path, weight)
    assert time.process_time() - begin < 1
    assert len(str(error.value).splitlines()) <= 3
    assert len(error.value.problem) < 600
    assert str(path) in error.value.problem
    assert bare(networks)
    return error.value.problem


def replace(name, value):
    return lambda tensors: tensors.update({name: value})


BROKEN = {
    "another width": (replace(DOWN, torch.ones(2, 320)), DOWN, "[2, 320]", f"unet's {QUERY} takes [r, 32]"),
    "too few sides": (replace(DOWN, torch.ones(())), DOWN, "is []", "[r, 32]"),
    "no elements": (replace(DOWN, torch.ones(0)), DOWN, "is [0]", "[r, 32]"),
    "another rank": (replace(UP, torch.ones(32, 4)), UP, "[32, 4]", "takes [32, 2]"),
    "another kernel": (
        replace("unet.conv_in.lora_A.weight", torch.ones(2, 4, 1, 1)),
        "unet.conv_in.lora_A.weight is [2, 4, 1, 1]",
        "takes [r, 4, 3, 3]",
    ),
    "no up": (lambda tensors: tensors.pop(UP), f"{DOWN} has no 'up'"),
    "no down": (lambda tensors: tensors.pop(DOWN), f"{UP} has no 'down'"),
    "alpha alone": (replace("lora_unet_conv_out.alpha", torch.ones(())), "has no"),
    "no layer": (
        replace("unet.down_blocks.7.to_q.lora_A.weight", torch.ones(4, 5)),
        "unet.down_blocks.7.to_q.lora_A.weight, [4, 5], is of no layer of this model's unet and text_encoder",
    ),
    "no network": (replace("lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha", torch.ones(())), "lora_te2_text"),
    "twice": (replace(f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight", torch.ones(2, 32)), "are both for"),
    "NaN": (lambda tensors: tensors[UP][5].fill_(torch.nan), UP, "no finite numbers"),
    "infinite": (lambda tensors: tensors[DOWN][0, 3].fill_(-torch.inf), DOWN, "no finite numbers"),
    "beyond the dtype": (replace(DOWN, torch.full((2, 32), 1e300, dtype=torch.float64)), DOWN, "torch.float32"),
    "whole numbers": (replace(DOWN, torch.ones(2, 32, dtype=torch.int8)), f"{DOWN} is I8"),
    "alpha NaN": (replace(f"unet.{QUERY}.alpha", torch.tensor(torch.nan)), "alpha", "scale nan"),
    "alpha not one number": (replace(f"unet.{QUERY}.alpha", torch.ones(2)), "alpha is [2]"),
    "DoRA": (replace(f"unet.{QUERY}.lora_magnitude_vector", torch.ones(32)), "DoRA"),
    "DoRA of kohya": (replace(f"lora_unet_{QUERY.replace('.', '_')}.dora_scale", torch.ones(32)), "DoRA"),
    "LoHa": (replace("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", torch.ones(2, 2)), "LoHa"),
    "LoKr": (replace("lora_unet_mid_block_attentions_0_proj_in.lokr_w1", torch.ones(2, 2)), "LoKr"),
    "Tucker": (replace("lora_unet_conv_in.lora_mid.weight", torch.ones(2, 2, 3, 3)), "Tucker"),
    "bias": (replace(f"unet.{QUERY}.lora_B.bias", torch.ones(32)), "an adapter with biases"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_does_not_fit_names_the_first_mismatch(untouched, few, tmp_path, kind):
    change, *said = BROKEN[kind]
    change(few)
    save_file(few, tmp_path / "lora.safetensors")
    problem = refusal(untouched, tmp_path / "lora.safetensors")
    assert all(words in problem for words in said), problem


def test_a_lora_of_another_structure(untouched, tmp_path):
    save_file(flat(random_lora({"unet": narrow("sdxl")}, 1)), tmp_path / "xl.safetensors")
    assert "it is of another structure" in refusal(untouched, tmp_path / "xl.safetensors")


METADATA = {
    "no JSON": ("{", "cannot be read"),
    "deep": ("[" * 100_000, "cannot be read"),
    "a list": ("[]", "cannot be read"),
    "patterns are a list": ('{"unet.alpha_pattern": [[1, 2]]}', "cannot be read"),
    "a regular expression": ('{"unet.alpha_pattern": {"(a+)+$": 2}}', "unet has an alpha for the pattern '(a+)+$'"),
    "alpha is a text": ('{"unet.lora_alpha": "4"}', "alpha '4'"),
    "alpha is NaN": ('{"unet.lora_alpha": NaN}', "alpha nan"),
    "alpha is huge": ('{"unet.alpha_pattern": {"to_q": 1e300}}', "alpha 1e+300"),
    "DoRA": ('{"unet.use_dora": true}', "unet has use_dora True"),
    "weights that it changes": ('{"text_encoder.init_lora_weights": "pissa"}', "init_lora_weights 'pissa'"),
}


@pytest.mark.parametrize("kind", METADATA)
def test_notes_in_the_header_that_are_broken_or_not_supported(untouched, few, tmp_path, kind):
    text, said = METADATA[kind]
    save_file(few, tmp_path / "lora.safetensors", {NOTES: text})
    assert said in refusal(untouched, tmp_path / "lora.safetensors")


@torch.no_grad()
def test_notes_in_the_header_count_and_many_cost_little(networks, lora):
    patterns = {f"x{i}": 1 for i in range(20_000)}
    patterns |= {
        "attn1.to_q": 6,
        f"^{QUERY}": 1,
        "text_model.encoder.layers.0.mlp.fc1": 4,
    }  # of those that fit, the first
    scaled = {
        name: value * ((6 if "attn1.to_q" in name else 3) / 2 if "lora_B" in name and name.startswith("unet") else 1)
        for name, value in lora[0].items()
    }
    expected = merged(networks, (scaled, 1.0))
    save_file(lora[0], lora[1], {NOTES: json.dumps({"unet.alpha_pattern": patterns, "unet.lora_alpha": 3})})
    begin = time.process_time()
    add_lora(networks, lora[1])
    assert time.process_time() - begin < 1
    assert close(outputs(networks), outputs(expected, torch.float64), 1e-4)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, True, "0.8", None])
def test_a_weight_is_a_finite_number(untouched, few, tmp_path, weight):
    save_file(few, tmp_path / "lora.safetensors")
    assert "the weight of" in refusal(untouched, tmp_path / "lora.safetensors", weight)


def test_files_that_are_no_lora(untouched, folder, tmp_path):
    assert "it holds no LoRA" in refusal(untouched, folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    assert "holds no tensors" in refusal(untouched, tmp_path / "empty.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"\x80\x02}q\x00.")
    (tmp_path / "innocent.safetensors").write_bytes(b"\x80\x02}q\x00.")
    for name in ("lora.bin", "innocent.safetensors"):
        assert "a pickle, which can run code and is never opened" in refusal(untouched, tmp_path / name)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "empty.safetensors").read_bytes()[:9])
    assert "safetensors" in refusal(untouched, tmp_path / "cut.safetensors")
    assert "does not exist" in refusal(untouched, tmp_path / "absent.safetensors")
    with pytest.raises(GazeError, match="does not exist"):
        add_lora(untouched, "\0")
    assert "pytorch_lora_weights.safetensors cannot be read" in refusal(untouched, folder)
