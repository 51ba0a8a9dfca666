"""Networks that visit a device, and types: pictures do not change where they must not.

No test here has an accelerator. torch's meta device stands for one where a network alone is looked at: it holds no
numbers, so what comes back unharmed was never moved away. In the pipeline, the moves are counted on the CPU.
"""

import threading
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from diffusion.errors import GazeError
from diffusion.placement import check_dtype, visiting
from pipelines import TextToImage

META = torch.device("meta")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.BatchNorm2d(4)).eval().requires_grad_(False)


def test_a_network_visits_a_device_and_its_weights_stay():
    module = network()
    before, weights = module.state_dict(), list(module.parameters())
    with torch.inference_mode():
        expected = module(torch.ones(1, 2, 3, 3))
        with visiting(module, META):
            assert {value.device for value in (*module.parameters(), *module.buffers())} == {META}
            assert module(torch.ones(1, 2, 3, 3, device=META)).device == META
        assert torch.equal(module(torch.ones(1, 2, 3, 3)), expected)
    assert all(one is other for one, other in zip(module.parameters(), weights, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_network_comes_home_after_an_error():
    module = network()
    with pytest.raises(RuntimeError, match="on the way"), visiting(module, META):
        raise RuntimeError("on the way")
    assert {value.device.type for value in module.state_dict().values()} == {"cpu"}


def test_visits_of_threads_wait_for_each_other_and_those_of_one_nest():
    module, other, inside, waited = network(), network(), threading.Event(), []

    def visit():
        with visiting(module, META):
            waited.append(inside.is_set())

    thread = threading.Thread(target=visit)
    with visiting(module, META), visiting(other, META), visiting(module, META):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        inside.set()
    thread.join()
    assert waited == [True]
    assert {value.device.type for value in (*module.parameters(), *other.parameters())} == {"cpu"}


def test_nobody_waits_where_a_network_is_at_home():
    module = network()

    def visit():
        with visiting(module, torch.device("cpu")):
            pass

    thread = threading.Thread(target=visit)
    with visiting(module, torch.device("cpu")):
        thread.start()
        thread.join(10)
        assert not thread.is_alive()


def test_the_pipeline_moves_text_encoder_and_autoencoder_while_it_uses_them(folder, monkeypatch):
    pipe = TextToImage.from_pretrained(folder)
    expected = pipe("a cat", seed=0, num_inference_steps=2).pixels_BCHW
    now: list[nn.Module] = []
    visits = []

    @contextmanager
    def spy(module, device):
        assert device == pipe.device
        now.append(module)
        visits.append(module)
        yield
        now.remove(module)

    def uses(module, method="forward"):
        original = getattr(module, method)

        def checked(*args):
            assert now == [module]
            return original(*args)

        setattr(module, method, checked)

    monkeypatch.setattr("pipelines.text_to_image.visiting", spy)
    text, autoencoder = pipe.model.text.model, pipe.model.autoencoder
    uses(text)
    uses(autoencoder, "decode")
    assert pipe.offload() is pipe
    for preview in pipe.steps("a cat", seed=0, num_inference_steps=2):  # noqa: B007, the last is looked at below
        assert now == [], "the U-Net runs alone"
    assert visits == [text]
    assert torch.equal(preview.result().pixels_BCHW, expected)
    assert visits == [text, autoencoder]


@pytest.mark.parametrize("tile", [None, 32, 64])
def test_a_tile_that_holds_the_picture_changes_nothing(folder, tile):
    pipe = TextToImage.from_pretrained(folder)
    expected = pipe(["a cat", "a dog"], seed=0, num_inference_steps=2).pixels_BCHW
    found = pipe.tile_vae(tile)(["a cat", "a dog"], seed=0, num_inference_steps=2).pixels_BCHW
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    alone = pipe("a cat", seed=0, num_inference_steps=2).pixels_BCHW
    assert torch.equal(alone, pipe.tile_vae(None)("a cat", seed=0, num_inference_steps=2).pixels_BCHW)


def test_a_small_tile_changes_the_picture_a_little(folder):
    pipe = TextToImage.from_pretrained(folder)
    whole, tiled = (pipe.tile_vae(t)("a cat", seed=0, num_inference_steps=2).pixels_BCHW for t in (None, 16))
    assert whole.shape == tiled.shape
    assert 0 < (whole - tiled).abs().mean() < 0.2
    with pytest.raises(GazeError, match="tile is 7"):
        pipe.tile_vae(7)


def test_bfloat16_draws_nearly_the_same_picture():
    """The shipped model: 50 dB over six prompts were measured."""
    options = {"seed": 0, "num_inference_steps": 10}
    whole = TextToImage.from_pretrained()("a red heart", **options).pixels_BCHW.clamp(-1, 1)
    pipe = TextToImage.from_pretrained(dtype=torch.bfloat16)
    assert {p.dtype for module in pipe.model.modules.values() for p in module.parameters()} == {torch.bfloat16}
    half = pipe("a red heart", **options)
    assert half.pixels_BCHW.dtype == torch.float32
    assert (half.pixels_BCHW.clamp(-1, 1) - whole).square().mean() < 4 * 10**-4  # 40 dB of a range of 2
    for preview in pipe.steps("a red heart", **options):
        assert preview.step.x_BCHW.dtype == torch.float32
        assert len(preview.images()) == 1


def test_float16_is_refused_where_it_would_take_hours(folder, monkeypatch):
    pipe = TextToImage.from_pretrained(folder, dtype=torch.float16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.raises(GazeError, match=r"(?s)this CPU cannot compute in float16.*bfloat16"):
        pipe("a cat")
    check_dtype(torch.float16, torch.device("cuda"))
    check_dtype(torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: True)
    check_dtype(torch.float16, torch.device("cpu"))
