"""What `gaze inspect` counts is what torch counts when the model runs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from diffusion.autoencoder import Autoencoder
from diffusion.convert import convert
from diffusion.errors import GazeError
from diffusion.unet import UNet
from pipelines.inspection import decode_floats, inspect, step_floats, table, unet_flops
from tests.narrow_models import FAMILIES, narrow_pipeline

TOKENS = 16


class Alive(TorchDispatchMode):
    """Counts the numbers in tensors that are made and still referred to, and the most of them at once."""

    def __init__(self):
        super().__init__()
        self.storages = WeakIdKeyDictionary()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                self.storages[made.untyped_storage()] = made.untyped_storage().nbytes() // made.element_size()
        self.most = max(self.most, sum(self.storages.values()))
        return out


@pytest.fixture(scope="module", params=FAMILIES)
def made(request, tmp_path_factory):
    pipeline = narrow_pipeline(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "model"
    pipeline.save_pretrained(folder)
    return pipeline, folder


def inputs(unet, height, width):
    generator = torch.Generator().manual_seed(0)
    vector = unet.config.projection_class_embeddings_input_dim
    return (
        torch.randn(1, 4, height, width, generator=generator),
        10.0,
        torch.randn(1, TOKENS, unet.config.cross_attention_dim, generator=generator),
        None if vector is None else torch.randn(1, vector, generator=generator),
    )


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (7, 10)])
def test_flops_are_those_that_torch_counts(made, size):
    unet = UNet.from_pretrained(made[1] / "unet")
    # The counter does not know the CPU's fused kernel, but the products that it stands for.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        unet(*inputs(unet, *size))
    assert unet_flops(unet, *size, TOKENS) == counter.get_total_flops()


def test_parameters_are_those_of_the_parts(made):
    pipeline, folder = made
    found = inspect(folder, 32, 32)["parameters"]
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert found.pop("total") == sum(found.values())
    assert found == {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def test_memory_is_about_what_a_run_takes(made):
    """At a size where pictures, not text or weights, take the room. Work space inside a kernel is not seen."""
    height = width = 48
    unet, vae = UNet.from_pretrained(made[1] / "unet"), Autoencoder.from_pretrained(made[1] / "vae")
    arguments = inputs(unet, height, width)
    with torch.inference_mode(), Alive() as alive:
        unet(*arguments)
    assert 0.85 < step_floats(unet, height, width) / alive.most < 1.15
    with torch.inference_mode(), Alive() as alive:
        vae.decode(arguments[0])
    assert 0.85 < decode_floats(vae, height, width) / alive.most < 1.15


def test_a_file_and_its_folder_cost_the_same(made, tmp_path):
    convert(made[1], tmp_path / "model.safetensors")
    one, other = inspect(tmp_path / "model.safetensors"), inspect(made[1])
    differ = {"model", "format"}
    assert {k: v for k, v in one.items() if k not in differ} == {k: v for k, v in other.items() if k not in differ}
    assert one["format"].startswith("single file, Stable Diffusion")
    assert (one["height"], one["width"]) == (32, 32)
    text = table(one)
    assert one["prediction_type"] in text
    assert f"{one['parameters']['total']:,} parameters" in text


def test_what_cannot_be_inspected_is_named(made, tmp_path):
    with pytest.raises(GazeError, match="does not exist"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(GazeError, match="height is 33; this model makes multiples of 2"):
        inspect(made[1], 33, 32)
    with pytest.raises(GazeError, match="width is 0"):
        inspect(made[1], 32, 0)
    with pytest.raises(GazeError, match="magic"):
        inspect(made[1], prediction_type="magic")
