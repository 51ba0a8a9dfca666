"""Every score function against loops written from its paper; models without cross-attention; all that takes them."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from diffusion import Denoiser, GazeError, UNet, UNetConfig, scores
from diffusion.attention_sites import sites
from diffusion.convert import convert
from diffusion.files import write_json
from diffusion.guidance import Guidance, classifier_free
from diffusion.pretrained import load_model, save_model
from diffusion.scores import KINDS, Additive
from pipelines import TextToImage
from pipelines.benchmark import compare
from pipelines.inspection import inspect, table, unet_flops
from pipelines.shipped import DEFAULT_MODEL
from tests.test_unet import SMALL, randn, small_unet
from tests.train.tiny import open_phase, run_here, tiny_recipe, weights
from train.choice import choose, networks
from train.config import Model
from train.optimizer import parameter_groups
from train.workload import count

ROWS, PLACES, TOKENS, CHANNELS, TEXT, HEADS = 2, 7, 5, 12, 10, 3
WIDTH = CHANNELS // HEADS
ADDED = {"dot": set(), "additive": {"combine"}, "bilinear": {"between"}, "cosine": {"log_scale"}}
# What a model's config says beside the usual.
NO_TEXT = {"cross_attention_dim": None}
ARMS = {
    **{kind: {"cross_attention_score": kind} for kind in KINDS},
    "pooled": {**NO_TEXT, "addition_embed_type": "pooled"},
    "none": NO_TEXT,
}


def layer_of(kind, channels=CHANNELS, heads=HEADS, text=TEXT):
    """What is learned is not where it begins."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = KINDS[kind](channels, heads, text)
        for name in ADDED[kind]:
            torch.nn.init.normal_(getattr(layer, name))
    return layer


def small(arm, **more):
    config = ARMS[arm] | ({"projection_class_embeddings_input_dim": 12} if arm == "pooled" else {}) | more
    return small_unet(dataclasses.replace(SMALL, **config))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def hidden():
    """A bias that weighs tokens, and hides the last one of the second row."""
    bias_B11S = randn(ROWS, 1, 1, TOKENS, seed=3)
    bias_B11S[1, ..., -1] = -math.inf
    return bias_B11S


# The papers. x: a place of the picture, s: a token of the text; W, U: the rows of a head in to_q and to_k.


def dot(q, k, layer, head):
    """Vaswani et al. 2017, eq. 1."""
    return sum(q[i] * k[i] for i in range(WIDTH)) / math.sqrt(WIDTH)


def additive(q, k, layer, head):
    """Bahdanau et al. 2014, appendix A.1.2: v^T tanh(W s + U h)."""
    return sum(layer.combine[head, i].item() * math.tanh(q[i] + k[i]) for i in range(WIDTH))


def bilinear(q, k, layer, head):
    """Luong et al. 2015, "general": h_t^T W_a h_s."""
    return sum(q[i] * layer.between[head, i, j].item() * k[j] for i in range(WIDTH) for j in range(WIDTH))


def cosine(q, k, layer, head):
    """Liu et al. 2022, section 3.3: cos(q, k) / tau."""
    temperature = 1 / math.exp(layer.log_scale[head].item())
    return sum(a * b for a, b in zip(q, k, strict=True)) / math.hypot(*q) / math.hypot(*k) / temperature


PAPERS = {"dot": dot, "additive": additive, "bilinear": bilinear, "cosine": cosine}


def by_loops(kind, layer, x_BNC, text_BSE, bias_B11S=None):
    """weights_BLNS and out_BNC before the last projection."""
    q_BNC, k_BSC, v_BSC = (
        (source.double() @ project.weight.detach().double().T).tolist()
        for source, project in ((x_BNC, layer.to_q), (text_BSE, layer.to_k), (text_BSE, layer.to_v))
    )
    weights_BLNS = torch.zeros(ROWS, HEADS, PLACES, TOKENS, dtype=torch.float64)
    out_BNC = torch.zeros(ROWS, PLACES, CHANNELS, dtype=torch.float64)
    for b, head, n in torch.cartesian_prod(*map(torch.arange, (ROWS, HEADS, PLACES))).tolist():
        part = slice(head * WIDTH, (head + 1) * WIDTH)
        found = [PAPERS[kind](q_BNC[b][n][part], k_BSC[b][s][part], layer, head) for s in range(TOKENS)]
        if bias_B11S is not None:
            found = [score + bias for score, bias in zip(found, bias_B11S[b, 0, 0].tolist(), strict=True)]
        raised = [math.exp(score) for score in found]
        for s in range(TOKENS):
            weights_BLNS[b, head, n, s] = raised[s] / sum(raised)
            out_BNC[b, n, part] += weights_BLNS[b, head, n, s] * torch.tensor(v_BSC[b][s][part])
    return weights_BLNS, out_BNC


@pytest.mark.parametrize("bias_B11S", [None, hidden()], ids=["plain", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_what_its_paper_says(kind, bias_B11S):
    layer, x, text = layer_of(kind), randn(ROWS, PLACES, CHANNELS), randn(ROWS, TOKENS, TEXT, seed=1)
    bias = () if bias_B11S is None else (bias_B11S,)
    weights_BLNS, out_BNC = by_loops(kind, layer, x, text, bias_B11S)
    q_BLND, (k_BLSD, v_BLSD) = layer.split(layer.to_q(x)), layer.keys_values(text)
    found = layer.weights(q_BLND, k_BLSD, *bias)
    assert found.dtype == torch.float32
    close(found, weights_BLNS)
    close(found.sum(-1), torch.ones(ROWS, HEADS, PLACES))
    attended = layer.attend(q_BLND, k_BLSD, v_BLSD, *bias)
    close(attended, found @ v_BLSD)
    close(layer(x, (k_BLSD, v_BLSD, *bias)), layer.to_out[0](out_BNC.float()))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_float32_under_autocast_too(kind):
    layer, q_BLND = layer_of(kind), randn(ROWS, HEADS, PLACES, WIDTH)
    k_BLSD = randn(ROWS, HEADS, TOKENS, WIDTH, seed=1)
    q_BLND.requires_grad_()
    expected = layer.weights(q_BLND, k_BLSD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.weights(q_BLND, k_BLSD)
        found[..., 0].sum().backward()
    assert found.dtype == torch.float32
    close(found, expected, 1e-5 if kind != "bilinear" else 0.05)  # its k goes through a matrix in bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_begin_with_the_same_weights_and_what_they_add_learns(kind):
    unet, plain = small(kind).train(), small("dot")
    state, usual = unet.state_dict(), plain.state_dict()
    added = {name for name in state if name not in usual}
    assert {name.split(".")[-1] for name in added} == ADDED[kind]
    assert all(".attn2." in name for name in added)
    assert len(added) == len(ADDED[kind]) * len(sites(unet, cross=True))
    assert all(torch.equal(state[name], value) for name, value in usual.items())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = unet(randn(2, 4, 8, 8), torch.tensor([0.25, 998.5]), randn(2, 5, 12, seed=1))
    output.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in unet.parameters())


def plainly_additive(q_BLND, k_BLSD, v_LD):
    return (torch.tanh(q_BLND[:, :, :, None] + k_BLSD[:, :, None]) * v_LD[:, None, None]).sum(-1)


class Largest(TorchDispatchMode):
    """The most numbers in a tensor made within it."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                self.numbers = max(self.numbers, made.untyped_storage().nbytes() // made.element_size())
        return out


@pytest.mark.parametrize("at_once", [1, 1000, 2**20])
def test_additive_scores_in_pieces_are_those_at_once(monkeypatch, at_once):
    monkeypatch.setattr(scores, "AT_ONCE", at_once)
    layer = layer_of("additive")
    inputs = [randn(ROWS, HEADS, 64, WIDTH), randn(ROWS, HEADS, 9, WIDTH, seed=1), layer.combine.detach()]
    upward = randn(ROWS, HEADS, 64, 9, seed=2)
    ours, theirs = ([each.clone().requires_grad_() for each in inputs] for _ in range(2))
    layer.combine = torch.nn.Parameter(inputs[2].clone())
    with Largest() as largest:
        found = layer.scores(*ours[:2])
        gradients = torch.autograd.grad(found, [*ours[:2], layer.combine], upward)
    expected = plainly_additive(*(each.double() for each in theirs))
    close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, theirs, upward.double()), strict=True):
        close(one, other, 1e-4)
    row = ROWS * HEADS * 9 * WIDTH  # of one place
    assert largest.numbers <= max(at_once, row, found.numel())


# In a U-Net


@pytest.mark.parametrize("arm", ARMS)
def test_saved_and_read_gives_the_same_bits(tmp_path, arm):
    unet = small(arm)
    unet.save_pretrained(tmp_path)
    read = UNet.from_pretrained(tmp_path)
    assert read.config == unet.config
    given = randn(2, 4, 8, 8), 7.5, randn(2, 5, 12, seed=1), randn(2, 12, seed=2) if arm == "pooled" else None
    assert torch.equal(read(*given), unet(*given))
    for name in ADDED.get(arm, ()):
        options = json.loads((tmp_path / "config.json").read_text())
        write_json(tmp_path / "config.json", options | {"cross_attention_score": "dot"})
        with pytest.raises(GazeError, match=name):
            UNet.from_pretrained(tmp_path)


def test_an_ordinary_config_is_written_as_ever(tmp_path):
    """The shipped model's was written before there were kinds."""
    written = DEFAULT_MODEL / "unet" / "config.json"
    config = UNetConfig.from_diffusers(json.loads(written.read_text()))
    write_json(tmp_path / "config.json", config.to_diffusers())
    assert (tmp_path / "config.json").read_bytes() == written.read_bytes()
    assert UNetConfig.from_diffusers(small("cosine").config.to_diffusers()).cross_attention_score == "cosine"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cross_attention_score": "addition"}, "those known are dot, additive, bilinear, cosine"),
        ({"cross_attention_score": None}, "not of the type"),
        ({"cross_attention_score": "cosine", "cross_attention_dim": None}, "nothing is scored"),
        ({"cross_attention_dim": 0}, "must be positive"),
        ({"addition_embed_type": "pooled"}, "pooled needs the width of its vector"),
        (
            {
                "addition_embed_type": "pooled",
                "projection_class_embeddings_input_dim": 8,
                "addition_time_embed_dim": 4,
            },
            "pooled has no size numbers",
        ),
    ],
)
def test_configs_that_make_no_sense_are_refused(options, says):
    with pytest.raises(GazeError, match=says):
        UNetConfig.from_diffusers(options)


def test_only_attentions_that_exist_are_listed():
    whole = [site.name for site in sites(small("dot"))]
    for arm in ("pooled", "none"):
        found = sites(small(arm))
        assert [site.name for site in found] == [name for name in whole if name.endswith("attn1")]
        assert not any("attn2" in name or "norm2" in name.split(".")[-2:-1] for name in small(arm).state_dict()
                       if "transformer_blocks" in name)  # fmt: skip
        assert sites(small(arm), cross=True) == []


@pytest.mark.parametrize("arm", ARMS)
def test_flops_are_those_that_torch_counts(arm):
    unet = small(arm)
    given = randn(1, 4, 7, 10), 10.0, randn(1, 5, 12), randn(1, 12) if arm == "pooled" else None
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(*given)
    assert unet_flops(unet, 7, 10, 5) == counter.get_total_flops()


# In a model


@pytest.fixture(scope="module", params=ARMS)
def arm(request):
    return request.param


@pytest.fixture(scope="module")
def armed(folder, arm):
    """The small pipeline with a fresh U-Net of the arm."""
    model = load_model(folder)
    own = {"projection_class_embeddings_input_dim": model.text.width} if arm == "pooled" else {}
    unet = small_unet(dataclasses.replace(model.unet.config, **ARMS[arm], **own))
    return dataclasses.replace(model, unet=unet)


@pytest.mark.parametrize("batch", [1, 2])
def test_guidance_is_what_two_calls_make_of_it(arm, armed, batch):
    x, prompts = randn(batch, 4, 16, 16), armed.encode(["a red cat", "dog"][:batch])
    empty = armed.encode([""])

    def alone(condition):
        return Denoiser(armed.unet, armed.schedule, condition)(x, 2.0)

    with torch.no_grad():
        guided = Denoiser(armed.unet, armed.schedule, prompts, empty, Guidance(3.0), [2.0])(x, 2.0)
        without, with_prompt = alone(empty.expand(batch)), alone(prompts)
    close(guided, classifier_free(without, with_prompt, 3.0), 1e-4)
    assert torch.equal(without, with_prompt) == (arm == "none")
    if arm == "pooled":
        ends = [armed.text.read(prompt).chunks[0].ids for prompt in ["a red cat", "dog"][:batch]]
        at_the_end = torch.stack([prompts.context_BSE[i, len(ids) + 1] for i, ids in enumerate(ends)])
        assert torch.equal(prompts.vector_BV, at_the_end)


def test_a_model_goes_through_everything(arm, armed, tmp_path):
    """Saved, read, inspected, drawn from; only what diffusers knows is opened by it or said in one file."""
    folder = tmp_path / "model"
    save_model(armed, folder)
    options = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 4.0}
    here, read = TextToImage(armed), TextToImage.from_pretrained(folder)
    prompts = ["a red cat", "dog"]
    close(read(prompts, **options).pixels_BCHW, here(prompts, **options).pixels_BCHW, 1e-4)
    report = inspect(folder)
    assert report["parameters"]["unet"] == sum(value.numel() for value in armed.unet.parameters())
    assert f"cross-attention: {'none' if arm in ('pooled', 'none') else arm}" in table(report)
    if arm == "dot":
        return
    with pytest.raises(ValueError, match="gaze is not one of the libraries"):
        StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    with pytest.raises(GazeError, match=r"single file|in one file"):
        convert(folder, tmp_path / "model.safetensors")
    with pytest.raises(GazeError, match="diffusers does not know"):
        compare(folder)


def test_only_what_is_there_and_read_can_be_fine_tuned(arm, armed):
    model = copy.deepcopy(armed)
    choose(model, Model(init_from="x", train=("*",), lora={"rank": 2}))
    beside = {name.split(".lora_")[0] for part in networks(model).values() for name, value in part.named_parameters()
              if value.requires_grad}  # fmt: skip
    assert any("attn1.to_k" in name for name in beside)
    assert any("attn2.to_k" in name for name in beside) == (arm in KINDS)
    assert any("q_proj" in name for name in beside) == (arm != "none")
    with pytest.raises(GazeError, match="is the name of no parameter"):
        choose(copy.deepcopy(armed), Model(init_from="x", train=("unet.*attn2.to_k*" if arm not in KINDS else "x",)))


# In training


def options_of(arm):
    return {"unet": ARMS[arm]}


@pytest.mark.parametrize("arm", ["additive", "bilinear", "pooled", "none"])
def test_what_a_step_costs_is_counted(data, vae, tmp_path, monkeypatch, arm):
    monkeypatch.setattr("train.cache.pack", lambda network: None)  # counters see nothing of weights that are laid out
    recipe = tiny_recipe(tmp_path / "run", data, vae, model=options_of(arm))
    samples, phase = open_phase(recipe)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        phase.loss(phase.module, [samples[n] for n in range(4)]).mean().backward()
    assert count(recipe, 4).flops == counter.get_total_flops()
    trained = {name for name, value in phase.module.named_parameters() if value.requires_grad}
    assert all(value.grad is not None for value in phase.module.parameters() if value.requires_grad)
    assert any(name.startswith("text_model") for name in trained) == (arm != "none")
    for group in parameter_groups(phase.module, recipe.optimizer.model_copy(update={"name": "muon"})):
        names = {name.split(".")[-1] for name, value in phase.module.named_parameters()
                 if any(value is each for each in group["params"])}  # fmt: skip
        assert not group["matrices"] or not names & {"between", "combine"}


@pytest.mark.parametrize("arm", ["additive", "pooled", "none"])
def test_a_run_trains_exports_and_draws(data, vae, tmp_path, arm):
    recipe = tiny_recipe(tmp_path / "run", data, vae, pictures=16, model=options_of(arm))
    pipe = TextToImage.from_pretrained(run_here(recipe))
    learned = weights(recipe.out)
    assert any(name.startswith("text_model") for name in learned) == (arm != "none")
    saved = load_file(recipe.out / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == {name.removeprefix("unet.") for name in learned if name.startswith("unet.")}
    images = pipe(["red square", "a blue one"], seed=0, num_inference_steps=2, guidance_scale=2.0).images
    assert len(images) == 2


def test_a_recipe_that_contradicts_itself_is_refused(data, vae, tmp_path):
    unet = {**ARMS["pooled"], "projection_class_embeddings_input_dim": 7}
    recipe = tiny_recipe(tmp_path / "run", data, vae, model={"unet": unet})
    for take in (open_phase, lambda recipe: count(recipe, 2)):
        with pytest.raises(GazeError, match="projection_class_embeddings_input_dim is 7, but the other parts make it"):
            take(recipe)


def test_the_additive_layer_is_an_attention_like_the_others():
    """What takes the place of its kernel is given the same, and taken out again."""
    layer = Additive(CHANNELS, HEADS, TEXT)
    x, texts = randn(ROWS, PLACES, CHANNELS), layer.keys_values(randn(ROWS, TOKENS, TEXT, seed=1))
    expected = layer(x, texts)
    layer.attend = lambda q_BLND, k_BLSD, v_BLSD: layer.weights(q_BLND, k_BLSD) @ v_BLSD
    close(layer(x, texts), expected)
    del layer.attend
    assert torch.equal(layer(x, texts), expected)
