"""The smallest runs that still have every part: 16-pixel pictures, 8 channels, a few steps of a few milliseconds."""

import json
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from train.config import Recipe
from train.metrics import MEASURED

SIZE = 16
COLOURS = ("red", "green", "blue", "orange", "black", "white", "pink", "grey")

AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "mid_block_add_attention": False,
}
UNET: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TEXT: dict[str, Any] = {"vocab_size": 530, "window": 8, "width": 16, "layers": 1, "heads": 2}

# Training processes are forked from a server that has everything imported but has run nothing. Making an optimizer
# imports torch's compiler, which takes seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["tests.train.tiny", "train.loop", "train.autoencoder_phase", "train.diffusion_phase", "torch._dynamo"]
)


def make_pictures(folder: Path, count: int = 20) -> Path:
    """Squares of one colour in two words each, some with two captions, some twice per epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        colour = COLOURS[index % len(COLOURS)]
        picture = Image.new("RGB", (SIZE, SIZE), colour)
        picture.putpixel((index % SIZE, index // SIZE), (127, 127, 127))
        picture.save(folder / f"{index}.png")
        text: Any = f"{colour} square" if index % 3 else [f"{colour} square", f"a {colour} one"]
        rows.append(json.dumps({"file_name": f"{index}.png", "text": text, "repeats": 1 + index % 2}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return folder


def make_vae(folder: Path) -> Path:
    from tests.small_pipeline import small_pipeline

    small_pipeline().vae.save_pretrained(folder)
    return folder


def tiny_recipe(folder: Path, pictures_in: Path | None, vae: Path | None = None, /, **changes: Any) -> Recipe:
    """A diffusion run when there is a vae, else an autoencoder run. changes: sections are merged."""
    values: dict[str, Any] = {
        "phase": "autoencoder" if vae is None else "diffusion",
        "out": folder,
        "pictures": 80,
        "batch_size": 8,
        "ema": {"half_life": 20},
        "checkpoint_every": 16,
        "log_every": 16,
        "data": {"folder": pictures_in, "size": SIZE},
        "model": {"autoencoder": AUTOENCODER} if vae is None else {"autoencoder_from": vae, "unet": UNET, "text": TEXT},
        "optimizer": {"learning_rate": 1e-3, "warmup": 16},
    }
    return Recipe.model_validate(merged(values, changes))


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: merged(values[key], changes[key]) for key in values.keys() & changes.keys()
            if isinstance(values[key], dict) and isinstance(changes[key], dict)}  # fmt: skip
    return {**values, **changes, **both}


def open_phase(recipe: Recipe) -> tuple[Any, Any]:
    """The stream and the phase of a run, in one process."""
    from train.data.open import open_source
    from train.processes import Processes
    from train.run import make_phase, open_stream

    data = open_stream(recipe, open_source(recipe))
    return data, make_phase(recipe, data, Processes())


def run_here(recipe: Recipe) -> Path:
    """Trains in this process, on one thread, as often as one likes: Accelerate allows one precision per process."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from train.loop import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        return train(recipe)
    finally:
        torch.set_num_threads(threads)


def run_one_step(recipe: Recipe) -> int:
    """Trains until a signal would end it, which has come before the first step. Returns the pictures seen."""
    from unittest import mock

    from train import loop

    class Impatient(loop.StopSignal):
        def __init__(self) -> None:
            super().__init__()
            self.received = True

    with mock.patch.object(loop, "StopSignal", Impatient):
        try:
            run_here(recipe)
        except loop.Stopped as stopped:
            return stopped.args[0]
    raise AssertionError("the run was not stopped")


def start(recipe: Recipe, **environment: str) -> Any:
    """Trains in a process of its own; exit codes as `python -m train`'s."""
    process = PROCESSES.Process(target=_main, args=(recipe.model_dump(mode="json"), environment))
    process.start()
    return process


def start_two(recipe: Recipe, **environment: str) -> list[Any]:
    """Two processes that train together, told of each other as `accelerate launch --cpu` tells them."""
    together = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    together |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    return [start(recipe, **together, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in (0, 1)]


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _main(values: dict[str, Any], environment: dict[str, str]) -> None:
    import sys

    from train.loop import NotFinite, Stopped

    os.environ.update(environment)
    try:
        run_here(Recipe.model_validate(values))
    except Stopped:
        sys.exit(130)
    except NotFinite as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def newest_files(out: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint, by name."""
    newest = max((out / "checkpoints").glob("[0-9]*"))
    return {path.name: path.read_bytes() for path in newest.iterdir()}


def weights(out: Path, part: str = "model") -> dict[str, Any]:
    """The tensors of the newest checkpoint."""
    from safetensors.torch import load_file

    files = max((out / "checkpoints").glob("[0-9]*")).glob(f"{part}-*.safetensors")
    return {name: value for file in files for name, value in load_file(file).items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference of two sets of weights, relative to the largest weight."""
    assert one.keys() == other.keys()
    largest = max(value.abs().max() for value in one.values())
    return float(max((one[name] - other[name]).abs().max() for name in one) / largest)


def rows(out: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what the machine, not the run, decides."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]
