"""LoRA files as peft, diffusers and kohya's sd-scripts lay them out: outputs as with diffusers' `load_lora_weights`."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from diffusion.clip import CLIPText
from diffusion.lora import add_lora
from diffusion.original_names import original_names
from diffusion.structure import unet_counts
from diffusion.unet import UNet, sinusoid
from pipelines import TextToImage
from tests.narrow_models import narrow_pipeline
from tests.random_lora import flat, layers_of, random_lora
from tests.small_pipeline import LATENTS, small_pipeline

CLASSES = {"unet": UNet, "text_encoder": CLIPText, "text_encoder_2": CLIPText}
PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")


@pytest.fixture(scope="module", params=["sd1", "sdxl"])
def pair(request, tmp_path_factory):
    """diffusers' pipeline, our networks with the same weights, and the folder with them."""
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = small_pipeline() if request.param == "sd1" else narrow_pipeline("sdxl")
    pipeline.save_pretrained(folder)
    parts = [part for part in CLASSES if getattr(pipeline, part, None) is not None]
    return pipeline, {part: CLASSES[part].from_pretrained(folder / part).eval() for part in parts}, folder


def made_by_peft(pipeline, networks, seed, every=1, alphas=False, **options):
    """As `random_lora`, for every so manieth layer; and peft's options, by part."""
    torch.manual_seed(seed)
    states, configs = {}, {}
    for part, network in networks.items():
        _, two, three, *_ = layers = layers_of(network)[::every]
        few = {"rank_pattern": {two: 3}, "alpha_pattern": {three.split(".", 1)[-1]: 5, two: 1}} if alphas else {}
        config = LoraConfig(r=2, target_modules=layers, init_lora_weights="gaussian", **few, **options)
        theirs = getattr(pipeline, part)
        theirs.add_adapter(config, "made")
        states[part] = {
            name: 0.3 * torch.randn_like(value) / value[0].numel() ** 0.5
            for name, value in get_peft_model_state_dict(theirs, adapter_name="made").items()
        }
        configs[part] = config.to_dict()
    pipeline.unload_lora_weights()
    return states, configs


def save(pipeline, folder, states, configs=None):
    """By diffusers, which makes a folder of it."""
    notes = {} if configs is None else {f"{part}_lora_adapter_metadata": value for part, value in configs.items()}
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": state for part, state in states.items()}, **notes)
    return folder


@torch.no_grad()
def outputs(networks):
    """Of all networks, ours or diffusers', on the same random inputs."""
    generator = torch.Generator().manual_seed(0)
    unet = networks["unet"]
    x_BCHW = torch.randn(2, 4, 17, 12, generator=generator)
    context_BSE = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    tokens_BS = torch.randint(0, 90, (2, 9), generator=generator)
    found = {part: network(tokens_BS) for part, network in networks.items() if part != "unet"}
    sizes_B6, pooled_BE = torch.rand(2, 6, generator=generator) * 500, torch.randn(2, 96, generator=generator)
    if not isinstance(unet, UNet):
        added = {"text_embeds": pooled_BE, "time_ids": sizes_B6}
        return {part: states.last_hidden_state for part, states in found.items()} | {
            "unet": unet(x_BCHW, 500, context_BSE, added_cond_kwargs=added).sample
        }
    vector_BV = None
    if unet.config.addition_embed_type is not None:
        embedded = sinusoid(sizes_B6.flatten(), unet.config.addition_time_embed_dim)
        vector_BV = torch.cat([pooled_BE, embedded.reshape(2, -1)], dim=1)
    return found | {"unet": unet(x_BCHW, 500, context_BSE, vector_BV)}


def check(pipeline, networks, files, references=None):
    """Our outputs with the files, their weights beside them, are diffusers' with the references, at most 1e-5 of the
    largest output apart; and the files matter."""
    plain = outputs(networks)
    remove = [add_lora(networks, path, weight) for path, weight in files]
    ours = outputs(networks)
    for undo in remove:
        undo()
    names = [f"a{i}" for i in range(len(files))]
    for name, reference in zip(names, references or [path for path, _ in files], strict=True):
        pipeline.load_lora_weights(reference, adapter_name=name)
    pipeline.set_adapters(names, [weight for _, weight in files])
    theirs = outputs({part: getattr(pipeline, part) for part in networks})
    pipeline.unload_lora_weights()
    for part in networks:
        assert (ours[part] - plain[part]).abs().max() > 0.05 * plain[part].abs().max(), part
        assert (ours[part] - theirs[part]).abs().max() < 1e-5 * theirs[part].abs().max(), part


def test_several_files_of_peft_with_their_options(pair, tmp_path):
    """Every linear layer and convolution; alphas and ranks of their own; alpha over the root of the rank."""
    pipeline, networks, _ = pair
    one = save(pipeline, tmp_path / "one", *made_by_peft(pipeline, networks, 1, alphas=True, lora_alpha=4))
    two = save(pipeline, tmp_path / "two", *made_by_peft(pipeline, networks, 2, every=4, lora_alpha=3, use_rslora=True))
    check(pipeline, networks, [(one, 0.8), (two, -0.5)])


def test_layouts_of_older_diffusers(pair, tmp_path):
    pipeline, networks, _ = pair
    states = random_lora(networks, 4, chosen=lambda layer: layer.endswith(PROJECTIONS))
    current = {part: convert_state_dict_to_diffusers(state) for part, state in states.items()}
    assert any(".lora.down." in name for name in current["unet"])
    assert any(".lora_linear_layer.down." in name for name in current["text_encoder"])
    check(pipeline, networks, [(save(pipeline, tmp_path / "current", current), 1.5)])
    old = {}
    for part, state in states.items():
        for name, value in state.items():
            layer, role = name.removesuffix(".weight").split(".lora_")
            *place, last = layer.replace(".to_out.0", ".to_out").split(".")
            old_last = "to_" + last.removesuffix("_proj").removeprefix("to_") + "_lora"
            place += ["processor"] if part == "unet" else []
            old[".".join([part, *place, old_last, {"A": "down", "B": "up"}[role], "weight"])] = value
    save_file(old, tmp_path / "old.safetensors")
    check(pipeline, networks, [(tmp_path / "old.safetensors", 1.5)])


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_a_file_that_diffusers_unet_saves_by_itself(pair, tmp_path):
    pipeline, networks, _ = pair
    alone = {"unet": networks["unet"]}
    config = LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "conv1"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, "made")
    pipeline.unet.save_lora_adapter(tmp_path, adapter_name="made")
    theirs = outputs({"unet": pipeline.unet})["unet"]
    pipeline.unload_lora_weights()
    plain = outputs(alone)["unet"]
    remove = add_lora(alone, tmp_path)
    ours = outputs(alone)["unet"]
    remove()
    assert (ours - plain).abs().max() > 0.05 * plain.abs().max()
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def as_kohya(networks, states, alpha_of):
    """peft's matrices under the names of kohya's sd-scripts, which trains SDXL's U-Net under its original names."""
    xl = "text_encoder_2" in networks
    begins = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if xl else "lora_te_", "text_encoder_2": "lora_te2_"}
    tensors = {}
    for part, state in states.items():
        layers = {name: name if part == "unet" else f"text_model.{name}" for name in layers_of(networks[part])}
        if part == "unet" and xl:
            layers = original_names("unet", layers, unet_counts(networks[part].config))
        for layer, name in layers.items():
            base = begins[part] + name.replace(".", "_")
            for role, kohya in (("A", "down"), ("B", "up")):
                short, long = f"{layer}.lora_{role}.weight", f"text_model.{layer}.lora_{role}.weight"
                tensors[f"{base}.lora_{kohya}.weight"] = state.get(short, state.get(long))
            tensors[f"{base}.alpha"] = torch.tensor(alpha_of(layer))
    return tensors


def test_kohyas_layout(pair, tmp_path):
    pipeline, networks, _ = pair
    states = random_lora(networks, 5)
    tensors = as_kohya(networks, states, lambda layer: 1.0)
    if "text_encoder_2" in networks:
        assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    save_file(tensors, tmp_path / "kohya.safetensors")
    check(pipeline, networks, [(tmp_path / "kohya.safetensors", 0.7)])


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_kohyas_alphas_of_each_layer_in_half_precision(pair, tmp_path):
    """diffusers, which leaves such alphas of attention layers out, reads a file with the scale in the matrices."""
    pipeline, networks, _ = pair
    states = random_lora(networks, 6)
    states = {part: {name: value.half() for name, value in state.items()} for part, state in states.items()}
    save_file(as_kohya(networks, states, lambda layer: 1.0 + 3 * ("attn1" in layer)), tmp_path / "kohya.safetensors")
    scaled = {
        name: value.float() * ((1 + 3 * ("attn1" in name)) / 2 if "lora_B" in name else 1)
        for name, value in flat(states).items()
    }
    check(pipeline, networks, [(tmp_path / "kohya.safetensors", 1.0)], [scaled])


@pytest.mark.parametrize("pair", ["sd1"], indirect=True)
def test_pictures(pair, tmp_path):
    """With convolutions packed, time shifts and the text's keys and values computed once."""
    theirs, networks, folder = pair
    ours = TextToImage.from_pretrained(folder)
    theirs.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler", clip_sample=False)
    latents = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(1))
    options = {"latents": latents, "num_inference_steps": 6, "guidance_scale": 5.0}
    plain = ours(["a red cat", "dog"], scheduler="ddim", **options).pixels_BCHW
    for i, weight in enumerate((0.9, 0.4)):
        ours.load_lora(save(theirs, tmp_path / str(i), random_lora(networks, 10 + i)), weight)
    for i in range(2):
        theirs.load_lora_weights(tmp_path / str(i), adapter_name=f"a{i}")
    theirs.set_adapters(["a0", "a1"], [0.9, 0.4])
    expected = theirs(["a red cat", "dog"], output_type="pt", **options).images
    theirs.unload_lora_weights()
    result = ours(["a red cat", "dog"], scheduler="ddim", **options)
    assert ((expected > 0) & (expected < 1)).float().mean() > 0.8  # not hidden by clamping
    assert (result.pixels_BCHW - plain).abs().max() > 0.2
    assert ((result.pixels_BCHW / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-4
