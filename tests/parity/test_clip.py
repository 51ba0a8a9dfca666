"""The text encoder holds what transformers' CLIPTextModel holds: names, shapes, outputs, gradients, files, start."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig as TheirConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.errors import GazeError

# As in the config.json of the published models, with the number of their parameter tensors.
FULL_SIZE = {
    "sd1": ({"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}, 196),
    "sd2": (
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
        372,
    ),
}
NARROW = {
    "sd1": {"hidden_act": "quick_gelu"},
    "sd2": {"hidden_act": "gelu", "num_attention_heads": 8},
    "one": {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 20, "layer_norm_eps": 1e-3},
}
SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 13, "bos_token_id": 0, "eos_token_id": 98}
# What the text_encoder/config.json of Stable Diffusion 2 says, written by a version of 2022.
PUBLISHED = {
    "_name_or_path": "stabilityai/stable-diffusion-2",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 4096,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "pad_token_id": 1,
    "projection_dim": 512,
    "torch_dtype": "float32",
    "transformers_version": "4.25.0.dev0",
    "vocab_size": 49408,
}


def narrow_pair(name):
    """The same small random model twice: transformers' and ours. Biases and norms are random too."""
    config = TheirConfig(**SMALL | NARROW[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = CLIPTextModel(config).eval()
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    ours = CLIPText(CLIPTextConfig.from_diffusers(config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


@pytest.fixture(scope="module", params=NARROW)
def pair(request):
    return narrow_pair(request.param)


def same(state, expected):
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_of_the_published_models(name):
    options, count = FULL_SIZE[name]
    with torch.device("meta"):
        theirs = CLIPTextModel(TheirConfig(**options))
        ours = CLIPText(CLIPTextConfig.from_diffusers(theirs.config.to_dict()))
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert len(expected) == count


@pytest.mark.parametrize(("rows", "length"), [(1, 13), (3, 13), (2, 7), (1, 1)])
def test_outputs_and_gradients(pair, rows, length):
    theirs, ours = pair
    tokens = torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(length))
    results = []
    for net in (theirs, ours):
        states = net(tokens)
        states = states if isinstance(states, torch.Tensor) else states.last_hidden_state
        parameters = dict(net.named_parameters())
        wave = torch.arange(states.numel()).reshape(states.shape).sin()  # a gradient for each number of its own
        gradients = torch.autograd.grad((states * wave).sum(), list(parameters.values()))
        results.append((states.detach(), dict(zip(parameters, gradients, strict=True))))
    (expected, expected_gradients), (states, gradients) = results
    assert states.shape == (rows, length, 32)
    assert (states - expected).abs().max() < 1e-5 * expected.abs().max()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for key, gradient in expected_gradients.items():
        # Adding one number to all keys changes no weight of the attention: the gradient of that bias is rounding.
        scale = largest if key.endswith("k_proj.bias") or length == 1 else gradient.abs().max()
        assert scale > 0, key
        assert (gradients[key] - gradient).abs().max() < 1e-4 * scale, key


def test_a_token_does_not_see_those_after_it(pair):
    _, ours = pair
    tokens = torch.arange(26).reshape(2, 13)
    tokens[1, :9] = tokens[0, :9]
    first, second = ours(tokens).detach()
    assert torch.allclose(first[:9], second[:9], atol=1e-6)
    assert not torch.allclose(first[9], second[9], atol=1e-2)


def test_fresh_weights_spread_as_those_of_transformers():
    config = TheirConfig(vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    torch.manual_seed(0)
    theirs = CLIPTextModel(config).state_dict()
    ours = CLIPText(CLIPTextConfig.from_diffusers(config.to_dict())).initialize().state_dict()
    for name, expected in theirs.items():
        if expected.std() == 0:
            assert torch.equal(ours[name], expected), name
        else:
            assert abs(ours[name].std() / expected.std() - 1) < 0.05, name
            assert abs(ours[name].mean()) < 0.1 * expected.std(), name
            assert not torch.equal(ours[name], expected), name


def test_files_written_by_transformers_open_here(tmp_path):
    theirs, ours = narrow_pair("sd2")
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for folder in ("whole", "shards"):
        read = CLIPText.from_pretrained(tmp_path / folder)
        assert read.config == ours.config
        same(read.state_dict(), ours.state_dict())
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16")
    half = CLIPText.from_pretrained(tmp_path / "half").state_dict()
    same(half, {name: value.half().float() for name, value in ours.state_dict().items()})


def test_files_of_older_versions_and_with_a_projection_open_here(tmp_path):
    theirs, ours = narrow_pair("sd1")
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    old = {f"text_model.{name}": value for name, value in load_file(weights).items()}
    old["text_model.embeddings.position_ids"] = torch.arange(13)[None]
    save_file(old, weights)
    same(CLIPText.from_pretrained(tmp_path).state_dict(), ours.state_dict())
    whole = CLIPTextModelWithProjection(theirs.config)
    whole.text_model.load_state_dict(theirs.state_dict())
    whole.save_pretrained(tmp_path / "projection")
    same(CLIPText.from_pretrained(tmp_path / "projection").state_dict(), ours.state_dict())


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_files_written_here_open_in_transformers(pair, tmp_path, dtype):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours", dtype)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == {f"text_model.{name}" for name in theirs.state_dict()}  # which version 4 reads too
    read, notes = CLIPTextModel.from_pretrained(tmp_path / "ours", output_loading_info=True, dtype=torch.float32)
    assert not any(notes.values())
    state = {name: value.to(dtype).float() for name, value in ours.state_dict().items()}
    same(read.state_dict(), state)
    for option in dataclasses.fields(ours.config):
        assert getattr(read.config, option.name) == getattr(theirs.config, option.name), option.name


def test_every_option_of_the_library_is_read_fixed_or_ignored():
    read = {field.name for field in dataclasses.fields(CLIPTextConfig)}
    fixed, ignored = set(CLIPTextConfig.FIXED), set(CLIPTextConfig.IGNORED)
    assert not read & fixed
    assert not read & ignored
    assert not fixed & ignored
    theirs = TheirConfig()
    options = {name for name in theirs.to_dict() if not name.startswith("_")} - {"model_type"}
    assert options | {field.name for field in dataclasses.fields(TheirConfig)} <= read | fixed | ignored
    assert read | fixed <= options
    ours = CLIPTextConfig()
    assert {name: getattr(ours, name) for name in read} == {name: getattr(theirs, name) for name in read}


def test_a_published_config_is_read():
    config = CLIPTextConfig.from_diffusers(PUBLISHED)
    assert (config.hidden_size, config.num_hidden_layers, config.hidden_act) == (1024, 23, "gelu")
    assert CLIPTextConfig.from_diffusers(config.to_diffusers()) == config
    assert CLIPTextConfig.from_diffusers(json.loads(json.dumps(config.to_diffusers()))) == config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu', but those known are gelu, quick_gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1 is not supported, only 0.0 is"),
        ({"hidden_sise": 8}, r"(?s)unknown option hidden_sise = 8.*did you mean 'hidden_size'"),
        ({"model_type": "t5"}, "this is a t5, not a clip_text_model"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, but it must divide hidden_size, 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, but it must be positive"),
        ({"hidden_size": "32"}, "hidden_size = '32' is not of the type"),
        ({"hidden_size": None}, "hidden_size = None is not of the type"),
        ({"vocab_size": 9.5}, "vocab_size = 9.5 is not of the type"),
        ({"vocab_size": True}, "vocab_size = True is not of the type"),
    ],
)
def test_what_is_not_supported_is_refused(options, says):
    with pytest.raises(GazeError, match=says):
        CLIPTextConfig.from_diffusers(SMALL | options)


def test_broken_files_are_named(tmp_path):
    theirs, _ = narrow_pair("one")
    with pytest.raises(GazeError, match=r"config.json is missing"):
        CLIPText.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    del state["final_layer_norm.bias"]
    save_file(state | {"head.weight": torch.ones(1)}, weights)
    with pytest.raises(GazeError, match=r"missing final_layer_norm.bias; unknown head.weight"):
        CLIPText.from_pretrained(tmp_path)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(GazeError, match="cannot be read"):
        CLIPText.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(GazeError, match=r"no model.safetensors"):
        CLIPText.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(GazeError, match="holds list"):
        CLIPText.from_pretrained(tmp_path)
