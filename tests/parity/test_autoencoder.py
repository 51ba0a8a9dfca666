"""The autoencoder holds what diffusers' AutoencoderKL holds: names, shapes, outputs, gradients, files."""

import dataclasses
import inspect
import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from diffusion.autoencoder import Autoencoder, AutoencoderConfig
from diffusion.errors import GazeError


def levels(*channels):
    down, up = ("DownEncoderBlock2D",) * len(channels), ("UpDecoderBlock2D",) * len(channels)
    return {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}


# As in the vae/config.json of Stable Diffusion 1.x and 2.x, and of SDXL.
PUBLISHED = levels(128, 256, 512, 512) | {"layers_per_block": 2, "sample_size": 512}
NARROW = {
    "sd": levels(16, 24, 32, 32) | {"layers_per_block": 2},
    "without attention": levels(8, 16) | {"mid_block_add_attention": False, "latent_channels": 3},
    "without quant": levels(16, 8, 24) | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 6},
    "one level": levels(8) | {"use_quant_conv": False, "in_channels": 1, "out_channels": 5, "scaling_factor": 1.7},
}


def narrow_pair(name):
    """The same small random model twice: diffusers' and ours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = AutoencoderKL(**{"norm_num_groups": 4} | NARROW[name]).eval()
        for parameter in theirs.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)  # norms and biases are not 1 and 0
    ours = Autoencoder.from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="module", params=NARROW)
def pair(request):
    return narrow_pair(request.param)


def same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def close(value, expected, tolerance=1e-5):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("added", [{}, {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}])
def test_names_and_shapes_of_the_published_models(added):
    with torch.device("meta"):
        theirs = AutoencoderKL(**PUBLISHED | added)
        ours = Autoencoder.from_config(dict(theirs.config))
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert len(expected) == 248
    assert (ours.factor, ours.latent_channels) == (8, 4)


@pytest.mark.parametrize(("rows", "size"), [(1, (32, 32)), (3, (17, 23))])
def test_outputs_and_gradients(pair, rows, size):
    """Sizes that the factor does not divide too: both then lose the same rows at the lower and right edges."""
    theirs, ours = pair
    noise = torch.Generator().manual_seed(rows)
    pixels = torch.randn(rows, theirs.config.in_channels, *size, generator=noise)
    results = []
    for net in (theirs, ours):
        leaf = pixels.clone().requires_grad_()
        if net is theirs:
            distribution = net.encode(leaf).latent_dist
            mean, log_variance = distribution.mean, distribution.logvar
            again = net.decode(mean + distribution.std).sample
        else:
            mean, log_variance = net.posterior(leaf)
            again = net.reconstruct(mean + (0.5 * log_variance).exp())
        outputs, parameters = (mean, log_variance, again), dict(net.named_parameters())
        waves = [torch.arange(output.numel()).reshape(output.shape).sin() for output in outputs]
        total = sum((output * wave).sum() for output, wave in zip(outputs, waves, strict=True))
        gradients = torch.autograd.grad(total, [leaf, *parameters.values()])
        results.append(([value.detach() for value in outputs], dict(zip(["x", *parameters], gradients, strict=True))))
    (expected, expected_gradients), (outputs, gradients) = results
    for output, other in zip(outputs, expected, strict=True):
        close(output, other)
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for key, gradient in expected_gradients.items():
        # Adding one number to all keys changes no weight of the attention: the gradient of that bias is rounding.
        scale = largest if key.endswith("to_k.bias") else gradient.abs().max()
        assert scale > 0, key
        assert (gradients[key] - gradient).abs().max() < 1e-4 * scale, key


def test_latents_are_scaled(pair):
    theirs, ours = pair
    scale = theirs.config.scaling_factor
    pixels = torch.randn(2, theirs.config.in_channels, 16, 24, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        distribution = theirs.encode(pixels).latent_dist
        mean, std = ours.encode(pixels)
        close(mean, distribution.mean * scale)
        close(std, distribution.std * scale)
        close(ours.decode(mean), theirs.decode(distribution.mean).sample)
    assert mean.shape == (2, ours.latent_channels, 16 // ours.factor, 24 // ours.factor)


def test_the_scale_can_be_set_from_latents():
    _, ours = narrow_pair("sd")
    latents = 3 * torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours.scale_to(latents)
    assert ours.config.scaling_factor == pytest.approx(1 / latents.std().item())
    assert (latents * ours.config.scaling_factor).std().item() == pytest.approx(1)


def test_extreme_log_variances_stay_finite():
    _, ours = narrow_pair("without quant")
    with torch.no_grad():
        ours.encoder.conv_out.bias[6:9] = 1e4
        ours.encoder.conv_out.bias[9:] = -1e4
    _, log_variance = ours.posterior(torch.zeros(1, 3, 8, 8))
    assert (log_variance[:, :3] == 20).all()
    assert (log_variance[:, 3:] == -30).all()


def test_files_written_by_diffusers_open_here(tmp_path):
    theirs, ours = narrow_pair("sd")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        read = Autoencoder.from_pretrained(tmp_path / folder)
        assert read.config == ours.config
        same(read.state_dict(), ours.state_dict())
        assert not read.training
        assert not any(parameter.requires_grad for parameter in read.parameters())
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    half = Autoencoder.from_pretrained(tmp_path / "half").state_dict()
    same(half, {name: value.half().float() for name, value in ours.state_dict().items()})


def test_files_with_the_old_names_of_the_attention_open_here(tmp_path):
    theirs, ours = narrow_pair("sd")
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {}
    for name, value in load_file(weights).items():
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = value
    assert any("proj_attn" in name for name in old)
    save_file(old, weights)
    same(Autoencoder.from_pretrained(tmp_path).state_dict(), ours.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_written_here_open_in_diffusers(pair, tmp_path, dtype):
    theirs, ours = pair
    ours.save_pretrained(tmp_path, dtype)
    read, notes = AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(notes.values())
    same(read.state_dict(), {name: value.to(dtype).float() for name, value in ours.state_dict().items()})
    for option in (*AutoencoderConfig.FIXED, *(field.name for field in dataclasses.fields(ours.config))):
        wanted = getattr(theirs.config, option)
        assert getattr(read.config, option) == (list(wanted) if isinstance(wanted, tuple) else wanted), option


def test_every_option_of_the_library_is_read_fixed_or_ignored():
    read = {field.name for field in dataclasses.fields(AutoencoderConfig)}
    fixed, ignored = set(AutoencoderConfig.FIXED), set(AutoencoderConfig.IGNORED)
    parameters = dict(inspect.signature(AutoencoderKL.__init__).parameters)
    del parameters["self"]
    assert len(read) + len(fixed) + len(ignored) == len(parameters)
    assert read | fixed | ignored == parameters.keys()
    ours = AutoencoderConfig()
    defaults = {name: parameters[name].default for name in read | fixed}
    assert defaults == {**{name: getattr(ours, name) for name in read}, **AutoencoderConfig.FIXED}


def test_a_config_survives_its_file():
    config = AutoencoderConfig.from_diffusers(PUBLISHED | {"_diffusers_version": "0.6.0"})
    assert AutoencoderConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shift_factor": 0.0609}, "shift_factor = 0.0609 is not supported, only None is"),
        ({"latents_mean": [0.0]}, r"latents_mean = \[0.0\] is not supported"),
        ({"act_fn": "relu"}, "act_fn = 'relu' is not supported"),
        ({"latent_chanels": 8}, r"(?s)unknown option latent_chanels = 8.*did you mean 'latent_channels'"),
        ({"_class_name": "AutoencoderTiny"}, "this is a AutoencoderTiny, not a AutoencoderKL"),
        ({"norm_num_groups": 5}, "block_out_channels is .*, but norm_num_groups, 5, must divide each"),
        ({"norm_num_groups": 0}, "norm_num_groups is 0, but it must be positive"),
        ({"block_out_channels": ()}, r"block_out_channels is \(\), but it must be positive"),
        (
            {"block_out_channels": (8, 8)},
            "down_block_types is .*, but DownEncoderBlock2D is needed for each of 2 levels",
        ),
        ({"up_block_types": ("AttnUpDecoderBlock2D",)}, "up_block_types is .*, but UpDecoderBlock2D is needed"),
        ({"block_out_channels": ("8",)}, "block_out_channels = .* is not of the type"),
        ({"latent_channels": None}, "latent_channels = None is not of the type"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0, but it must be positive"),
    ],
)
def test_what_is_not_supported_is_refused(options, says):
    with pytest.raises(GazeError, match=says):
        Autoencoder.from_config(levels(8) | {"norm_num_groups": 4} | options)


def test_broken_files_are_named(tmp_path):
    theirs, _ = narrow_pair("one level")
    with pytest.raises(GazeError, match=r"config.json is missing"):
        Autoencoder.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"decoder.conv_in.bias": torch.ones(9)}, weights)
    with pytest.raises(GazeError, match=r"decoder.conv_in.bias is \[9\], the config says \[8\]"):
        Autoencoder.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(GazeError, match="cannot be read"):
        Autoencoder.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(GazeError, match=r"no diffusion_pytorch_model.safetensors"):
        Autoencoder.from_pretrained(tmp_path)
