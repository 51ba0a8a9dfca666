"""Word weights inside attention: the share of a word becomes w p / sum(w p), in every layer of every model."""

import math

import pytest
import torch

from diffusion.attention import Attention
from diffusion.attention_sites import attending, sites
from diffusion.errors import GazeError
from diffusion.pretrained import load_model
from diffusion.words import words_of
from tests.narrow_models import narrow_pipeline
from tests.small_pipeline import LATENTS, WINDOW

FEW = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": 0, "scheduler": "ddim"}
WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0)
SIZES = (32, 32, 0, 0, 32, 32)


def encode(model, *prompts, chunks=1):
    return model.encode(prompts, SIZES, chunks, "attention")


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / "model"
    narrow_pipeline("sdxl").save_pretrained(folder)
    return load_model(folder)


@torch.no_grad()
def recorded(model, condition):
    """The site, q, k and bias of every attention to the text, in one call of the network."""
    found = []

    def attend(site, usual, q, k, v, *bias):
        found.append((site, q, k, *bias))
        return usual(q, k, v, *bias)

    x = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(0))
    with attending(sites(model.unet, cross=True), attend):
        model.unet(x, 500, condition.context_BSE, condition.vector_BV, condition.weight_BS)
    return found


@pytest.mark.parametrize("structure", ["sd1", "sdxl"])
def test_the_share_of_a_word_follows_its_weight_in_every_layer(pipe, sdxl, structure):
    model = pipe.model if structure == "sd1" else sdxl
    words = words_of(model.text.read("a red cat"), model.text.window)
    tokens = words.tokens(*words.numbers("red"))
    runs = {w: recorded(model, encode(model, f"a (red:{w}) cat")) for w in WEIGHTS}
    plain = recorded(model, encode(model, "a red cat"))
    assert len(plain) == len(sites(model.unet, cross=True))
    assert all(len(layer) == 3 for layer in plain + runs[1.0])  # no bias at all
    for number, (site, q, k) in enumerate(plain):
        share = site.layer.weights(q, k)[..., tokens].sum(-1).double()
        before = torch.full_like(share, -1)
        for w in WEIGHTS:
            own_site, own_q, own_k, *bias = runs[w][number]
            assert own_site == site
            assert torch.equal(own_k, k)  # the states are left plain
            found = site.layer.weights(q, k, *bias)[..., tokens].sum(-1).double()
            torch.testing.assert_close(found, w * share / (1 - share + w * share), rtol=1e-4, atol=1e-7)
            assert (found > before).all()
            before = found
            # In the run itself, whose q has seen the weights of the layers before.
            own = site.layer.weights(own_q, own_k)[..., tokens].sum(-1).double()
            seen = site.layer.weights(own_q, own_k, *bias)[..., tokens].sum(-1).double()
            torch.testing.assert_close(seen, w * own / (1 - own + w * own), rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_an_independent_loop():
    generator = torch.Generator().manual_seed(0)
    layer = Attention(8, 2, 6)
    x, source = torch.randn(1, 3, 8, generator=generator), torch.randn(1, 5, 6, generator=generator)
    weight = torch.tensor([[1.0, 0.0, 0.25, 3.0, 1.5]])
    out = layer(x, (*layer.keys_values(source), weight.log()[:, None, None]))
    w = {name: parameter.double() for name, parameter in layer.named_parameters()}
    q, k = x[0].double() @ w["to_q.weight"].T, source[0].double() @ w["to_k.weight"].T
    v = source[0].double() @ w["to_v.weight"].T
    expected = torch.zeros(3, 8, dtype=torch.float64)
    for n in range(3):
        for head in (slice(0, 4), slice(4, 8)):
            parts = [weight[0, s].item() * math.exp(q[n, head] @ k[s, head] / 2) for s in range(5)]
            expected[n, head] = sum(part * v[s, head] for s, part in enumerate(parts)) / sum(parts)
    expected = expected @ w["to_out.0.weight"].T + w["to_out.0.bias"]
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_weights_of_1_change_no_bit(pipe):
    assert encode(pipe.model, "a (red:1.0) cat").weight_BS is None
    plain = pipe("a red cat", negative_prompt="dog", **FEW).pixels_BCHW
    same = pipe("a (red:1.0) cat", negative_prompt="(dog:1)", weighting="attention", **FEW).pixels_BCHW
    assert torch.equal(same, plain)
    assert not torch.equal(pipe("a (red:1.5) cat", weighting="attention", **FEW).pixels_BCHW, plain)


@torch.no_grad()
def test_weight_0_hides_a_word(pipe):
    model = pipe.model
    condition = encode(model, "a (red:0) cat")
    hidden = condition.weight_BS == 0
    assert hidden.sum() == 1
    x = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(0))
    context = condition.context_BSE
    output = model.unet(x, 500, context, None, condition.weight_BS)
    other = context.masked_fill(hidden[:, :, None], 7.0)
    assert torch.equal(model.unet(x, 500, other, None, condition.weight_BS), output)
    assert not torch.equal(model.unet(x, 500, context), output)


def test_a_picture_is_the_same_beside_others_without_weights(pipe):
    long = "a red dog and a (cat:2) " * WINDOW
    prompts = ["a (red:1.7) cat", "dog", long, f"{long} (cat:0)"]
    negatives = ["(dog:0.5) cat", "red", "(red:2)", long]
    options = {**FEW, "weighting": "attention"}
    together = pipe(prompts, negative_prompt=negatives, **options).pixels_BCHW
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = pipe(prompt, negative_prompt=negative, **options | {"seed": i}).pixels_BCHW[0]
        assert (alone - together[i]).abs().max() < 1e-4
    plain = pipe(prompts[0], negative_prompt="dog cat", **options).pixels_BCHW[0]
    assert (plain - together[0]).abs().max() > 1e-3  # weights of the negative prompt count


def test_padding_stays_hidden(pipe):
    text = pipe.model.text
    weight = text.encode(["a (red:2) cat", "dog"], weighting="attention", mask_padding=True).weight_BS
    assert weight.tolist() == [[1, 1, 2, 1, 1] + [0] * (WINDOW - 5), [1, 1, 1] + [0] * (WINDOW - 3)]


def test_an_unknown_weighting_is_named(pipe):
    with pytest.raises(GazeError, match="'atention'") as error:
        pipe("cat", weighting="atention", **FEW)
    assert "attention" in error.value.hint
