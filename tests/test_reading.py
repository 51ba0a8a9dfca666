"""Weights are read from their places in a file: bit for bit what safetensors' own reader gives, in little memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion.errors import GazeError
from diffusion.files import TYPES, read_tensors, read_weights
from diffusion.header import BYTES, read_header
from diffusion.pretrained import load_model
from diffusion.single_file import open_single_file
from tests.narrow_models import narrow_pipeline


def made(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Any bits that the dtype has, NaN and the like included."""
    generator = torch.Generator().manual_seed(len(shape))
    width = torch.empty((), dtype=dtype).element_size()
    count = torch.Size(shape).numel() * width
    content = torch.randint(2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=generator)
    return content.view(dtype).view(shape)


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.contiguous().view(-1).view(torch.uint8)


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(tmp_path):
    assert TYPES.keys() == BYTES.keys()
    assert all(torch.empty((), dtype=TYPES[name]).element_size() == BYTES[name] for name in BYTES)
    shapes = [(), (0,), (1,), (7,), (3, 5), (2, 1, 3, 2)]
    tensors = {f"{name} {shape}": made(dtype, *shape) for name, dtype in TYPES.items() for shape in shapes}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    expected = load_file(path)
    found = dict(read_tensors(path, read_header(path).tensors))
    assert found.keys() == expected.keys() == tensors.keys()
    for name, value in found.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(bits(value), bits(expected[name])), name
        assert torch.equal(bits(value), bits(tensors[name])), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_has_the_dtype_asked_for(tmp_path, dtype):
    pipeline = narrow_pipeline("sd1")
    pipeline.save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", dtype=dtype)
    for name, module in model.modules.items():
        expected = getattr(pipeline, name).state_dict()
        for key, value in module.state_dict().items():
            wanted = expected[key if key in expected else f"text_model.{key}"]
            assert torch.equal(value, wanted.to(dtype)), (name, key)


def test_the_parts_of_one_tensor_are_tensors_of_their_own(tmp_path):
    """OpenCLIP stores queries, keys and values as one."""
    from diffusion.convert import convert

    narrow_pipeline("sd2").save_pretrained(tmp_path / "model")
    convert(tmp_path / "model", tmp_path / "model.safetensors")
    for dtype in (None, torch.float32, torch.bfloat16):
        state = open_single_file(tmp_path / "model.safetensors").read("text_encoder", dtype)
        assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)
        folder = read_weights(tmp_path / "model" / "text_encoder", "model", dtype)
        assert all(torch.equal(folder[name if name in folder else f"text_model.{name}"], state[name]) for name in state)


def test_a_file_that_became_shorter_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, path)
    entries = read_header(path).tensors
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(GazeError, match=r"model.safetensors cannot be read: it ends within b"):
        dict(read_tensors(path, entries))
    path.unlink()
    with pytest.raises(GazeError, match=r"model.safetensors cannot be read: .*No such file"):
        dict(read_tensors(path, entries))


PEAK = """
import re, sys, torch
from diffusion.files import read_weights

def most():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

read_weights(sys.argv[1] + "/small")
before = most()
weights = read_weights(sys.argv[1] + "/large", dtype=getattr(torch, sys.argv[2]))
print(most() - before, sum(value.nbytes for value in weights.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_load_takes_the_weights_and_the_largest_tensor(tmp_path, dtype):
    for name, count in (("small", 2), ("large", 2**11)):
        (tmp_path / name).mkdir()
        tensors = {str(i): torch.ones(count, 2**10) for i in range(16)}
        save_file(tensors, tmp_path / name / "diffusion_pytorch_model.safetensors")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=True)
    peak, weights = map(int, done.stdout.split())
    largest = 4 * 2**21  # as it is in the file
    assert weights == 16 * largest // (1 if dtype == "float32" else 2)
    assert peak < weights + largest + 8 * 2**20
