"""Training throughput: here against diffusers' script, of two processes against one, and where a step's time goes.

    python benchmarks/training.py peer SCRIPT [--python PYTHON] [--size small|medium|large|sd] [--rounds 5] [--batch 8]
                                              [--only REGEX]
    python benchmarks/training.py gpu SCRIPT [--python PYTHON] [--batch 32]
    python benchmarks/training.py processes [...]
    python benchmarks/training.py share [...]

SCRIPT: diffusers' examples/text_to_image/train_text_to_image.py, a copy outside this repository. PYTHON: an interpreter
that has what the script imports beyond our needs (datasets, torchvision); default this one.

Each run is a process of its own; sides take turns (A B C A B C ...), and a ratio is of two runs of one round. Same
U-Net from the same fresh weights, the same autoencoder and text encoder, both frozen, drawn pictures, AdamW with the
same rate, betas, eps, decay and clip, an average of the weights, one process. On the CPU, but for `gpu`: there the
U-Net of Stable Diffusion 1.5 and an autoencoder of its structure, at 256 and at 512 pixels.

Pictures per second are over the steps after the first WARM: from the end of one optimizer step to the end of another,
start and end of the run left out. CPU seconds stand beside those of the clock: other programs on the machine disturb
them less. What is cached is computed before the first step and not counted. Differences that remain: we do not decay
biases and norms, the averages' lengths differ, diffusers draws its noise from one generator and writes to TensorBoard.
`processes` has the same global batch on both sides; what two runs that know nothing of each other reach at once is the
most that this machine gives.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

from diffusion.autoencoder import Autoencoder, AutoencoderConfig
from diffusion.unet import UNet, UNetConfig
from pipelines.shipped import DEFAULT_MODEL
from tests.train.tiny import free_port, merged
from train.config import Recipe
from train.data.drawn import draw_folder
from train.devices import mfu
from train.workload import count

ROOT = Path(__file__).resolve().parent.parent
STEP_TIMES = Path(__file__).with_name("step_times.py")
WARM = 3  # steps
SIDES = {"gpu": (32, 64)}  # of the latents
SIDE = 32  # the same in the other modes
PICTURES = 256  # or as many as the steps see, where these are fewer
RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.999), 0.01, 1.0
CHANNELS = {"small": (64, 128), "medium": (128, 256, 512), "large": (160, 320, 640, 640), "sd": (320, 640, 1280, 1280)}
WIDTH = 64  # of a head, about
SD_HEADS = 8
FACTOR = {"shipped": 4, "sd": 8}  # pixels of a latent
SD = AutoencoderConfig(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
)

Run = Callable[[], dict]


def make_model(folder: Path, size: str, autoencoder: str, side: int) -> Path:
    """A Stable Diffusion folder: the shipped text encoder, a fresh U-Net in SD's manner, the autoencoder asked for."""
    folder.mkdir(parents=True)
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        source = DEFAULT_MODEL / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
    channels = CHANNELS[size]
    levels = len(channels)
    torch.manual_seed(0)
    if autoencoder == "sd":
        shutil.rmtree(folder / "vae")
        Autoencoder(SD).save_pretrained(folder / "vae")
    UNet(
        UNetConfig(
            sample_size=side,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            # Which is their number.
            attention_head_dim=SD_HEADS if size == "sd" else tuple(width // WIDTH for width in channels),
            cross_attention_dim=192,
        )
    ).save_pretrained(folder / "unet")
    return folder


def measure(
    command: list[str],
    out: Path,
    threads: int,
    *more: str,
    python: str = sys.executable,
    ranks: int = 1,
    gpu: bool = False,
) -> dict:
    """The step times of the first of `ranks` processes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment |= {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
    times = [out.with_suffix(f".{rank}.json") for rank in range(ranks)]
    started = [
        subprocess.Popen(
            [python, str(STEP_TIMES), str(times[rank]), *more, *command],
            cwd=ROOT,
            env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [process.communicate()[0] for process in started]
    for process, text in zip(started, said, strict=True):
        if process.returncode:
            sys.exit(f"{' '.join(command)}\n{text[-3000:]}")
    return json.loads(times[0].read_text())


class Bench:
    """A model, pictures and settings; its methods are one run each. side: of the latents."""

    def __init__(self, folder: Path, arguments: argparse.Namespace, side: int):
        self.folder, self.arguments, self.gpu = folder, arguments, arguments.mode == "gpu"
        self.model = make_model(folder / "model", arguments.size, arguments.autoencoder, side)
        self.pixels = side * FACTOR[arguments.autoencoder]
        count = min(PICTURES, arguments.steps * arguments.batch)
        self.pictures = draw_folder(folder / "pictures", count, self.pixels, 0)

    def recipe(self, out: Path, **changes: object) -> Recipe:
        pictures = self.arguments.steps * self.arguments.batch
        values = {
            "phase": "diffusion", "out": out, "pictures": pictures, "batch_size": self.arguments.batch,
            "checkpoint_every": 10 * pictures,
            "data": {"folder": self.pictures, "size": self.pixels, "caption_dropout": 0.0},
            "model": {"init_from": str(self.model), "train": ["unet.*"]},
            "optimizer": {"learning_rate": RATE, "betas": BETAS, "weight_decay": DECAY, "decay": "constant",
                          "clip": CLIP},
        }  # fmt: skip
        return Recipe.model_validate(merged(values, changes))

    def ours(self, *more: str, threads: int | None = None, ranks: int = 1, **changes: object) -> dict:
        out = Path(tempfile.mkdtemp(dir=self.folder))
        recipe = self.recipe(out / "run", **changes).model_dump(mode="json")
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        result = measure(["train", str(out / "recipe.yaml")], out / "times", threads or self.arguments.threads, *more,
                         ranks=ranks, gpu=self.gpu)  # fmt: skip
        shutil.rmtree(out)
        return result

    def theirs(self, *options: str) -> dict:
        out = Path(tempfile.mkdtemp(dir=self.folder))
        command = [str(self.arguments.script.resolve()), f"--pretrained_model_name_or_path={self.model}",
                   f"--train_data_dir={self.pictures}", f"--cache_dir={self.folder / 'datasets'}",
                   f"--output_dir={out / 'run'}", f"--resolution={self.pixels}", "--center_crop", "--use_ema",
                   f"--train_batch_size={self.arguments.batch}", f"--max_train_steps={self.arguments.steps}",
                   "--checkpointing_steps=1000000", f"--learning_rate={RATE}", "--lr_scheduler=constant",
                   f"--adam_beta1={BETAS[0]}", f"--adam_beta2={BETAS[1]}", f"--adam_weight_decay={DECAY}",
                   f"--max_grad_norm={CLIP}", "--seed=0", *options]  # fmt: skip
        result = measure(command, out / "times", self.arguments.threads, python=self.arguments.python, gpu=self.gpu)
        shutil.rmtree(out)
        return result

    def speed(self, times: dict, clock: str) -> float:
        """Pictures per second over the steady steps. clock: "ends" of the wall, "cpu" of all threads together."""
        seconds = times[clock]
        return self.arguments.batch * (len(seconds) - 1 - WARM) / (seconds[-1] - seconds[WARM])


def compare(bench: Bench, runs: dict[str, Run], ratios: list[tuple[str, str, str]]) -> dict[str, float]:
    """ratios: (what, the side above, the side below). Returns the median speed of each side."""
    speeds: dict[tuple[str, str], list[float]] = {(name, clock): [] for name in runs for clock in ("ends", "cpu")}
    for number in range(bench.arguments.rounds):
        for name, run in runs.items():
            times = run()
            for clock in ("ends", "cpu"):
                speeds[name, clock].append(bench.speed(times, clock))
        said = ", ".join(f"{name} {speeds[name, 'ends'][-1]:.2f}/s" for name in runs)
        print(f"round {number + 1}: {said}", file=sys.stderr)
    for name in runs:
        print(f"{name:52} {np.median(speeds[name, 'ends']):8.2f} pictures/s")
    for what, above, below in (ratio for ratio in ratios if runs.keys() >= {*ratio[1:]}):
        for clock, unit in (("ends", ""), ("cpu", ", per CPU second of a process")):
            each = np.divide(speeds[above, clock], speeds[below, clock])
            low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
            spread = f"quartiles {low:.2f} to {high:.2f}, all {each.min():.2f} to {each.max():.2f}"
            print(f"{what:52} {middle:8.2f} x ({spread}){unit}", flush=True)
    return {name: float(np.median(speeds[name, "ends"])) for name in runs}


def peer(bench: Bench) -> None:
    nothing = {"cache_latents": False, "cache_text": False}
    runs: dict[str, Run] = {
        "diffusers fp32": bench.theirs,
        "gaze fp32, nothing cached": lambda: bench.ours(data=nothing),
        "gaze fp32, as it comes": bench.ours,
        "gaze bf16, as it comes": lambda: bench.ours(mixed_precision="bf16"),
        "diffusers bf16": lambda: bench.theirs("--mixed_precision=bf16"),
    }
    runs = {name: run for name, run in runs.items() if re.search(bench.arguments.only, name)}
    compare(bench, runs, [
        ("fp32, nothing cached / diffusers fp32", "gaze fp32, nothing cached", "diffusers fp32"),
        ("fp32, latents and text precomputed / diffusers fp32", "gaze fp32, as it comes", "diffusers fp32"),
        ("bf16, latents and text precomputed / diffusers fp32", "gaze bf16, as it comes", "diffusers fp32"),
        ("bf16, latents and text precomputed / diffusers bf16", "gaze bf16, as it comes", "diffusers bf16"),
    ])  # fmt: skip


def processes(bench: Bench) -> None:
    half = bench.arguments.batch // 2

    def apart() -> dict:
        """Two runs at once with half the batch each, which together are a run of the whole batch; the slower one."""
        alone = partial(bench.ours, threads=1, batch_size=half, pictures=bench.arguments.steps * half)
        with ThreadPoolExecutor() as pool:
            both = [run.result() for run in [pool.submit(alone), pool.submit(alone)]]
        return max(both, key=lambda times: times["ends"][-1] - times["ends"][WARM])

    one, two, most = "1 process of 1 thread", "2 processes of 1 thread", "2 runs of 1 thread, half the batch each"
    runs: dict[str, Run] = {
        one: lambda: bench.ours(threads=1),
        two: lambda: bench.ours(threads=1, ranks=2),
        most: apart,
    }
    compare(bench, runs, [
        ("2 processes / 1 process, the same global batch", two, one),
        ("2 runs at once / 1 process, the most there is", most, one),
        ("2 processes / 2 runs at once, what is not lost", two, most),
    ])  # fmt: skip


def gpu(bench: Bench) -> None:
    bf16, compiled = "gaze bf16, latents and text precomputed", "the same, compiled"
    theirs = "diffusers bf16"
    runs: dict[str, Run] = {
        bf16: lambda: bench.ours(mixed_precision="bf16"),
        compiled: lambda: bench.ours(mixed_precision="bf16", compile=True),
        theirs: lambda: bench.theirs("--mixed_precision=bf16"),
    }
    print(f"{bench.pixels} pixels")
    ratios = [(f"{name} / {theirs}", name, theirs) for name in (bf16, compiled)]
    speeds = compare(bench, runs, ratios)
    flops = count(bench.recipe(bench.folder / "none", mixed_precision="bf16"), 1).model_flops
    for name, speed in speeds.items():
        share = mfu(flops, speed, torch.device("cuda"))
        print(f"{name:52} {'peak unknown' if share is None else f'{share:8.1%} MFU of the U-Net'}")


def share(bench: Bench) -> None:
    """The time from the end of one optimizer step to the end of the next, by what it went into."""
    figures: dict[str, list[float]] = {}
    for _ in range(bench.arguments.rounds):
        times = bench.ours("--parts")
        steps, parts = np.diff(times["ends"])[WARM:], times["parts"][WARM + 1 :]
        spent = {
            name: sum(part[name] for part in parts) for name in ("forward", "backward", "optimizer", "clip", "ema")
        }
        spent["all else"] = steps.sum() - sum(spent.values())
        spent["outside forward, backward and optimizer"] = spent["clip"] + spent["ema"] + spent["all else"]
        for name, seconds in spent.items():
            figures.setdefault(name, []).append(seconds / steps.sum())
    for name, shares in figures.items():
        print(f"{name:42} {np.median(shares):6.2%}  ({min(shares):.2%} to {max(shares):.2%})")


MODES = {"peer": peer, "gpu": gpu, "processes": processes, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("script", nargs="?", type=Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--size", choices=CHANNELS, default="small", help="sd: 20 GB on the CPU")
    parser.add_argument("--autoencoder", choices=FACTOR, default="shipped", help="sd: of its structure, not trained")
    parser.add_argument("--only", default="", metavar="REGEX", help="of peer, the sides whose names have this in them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if (arguments.mode in ("peer", "gpu")) != (arguments.script is not None):
        parser.error("peer and gpu need the path of train_text_to_image.py, the other modes none")
    if arguments.mode == "gpu":
        if not torch.cuda.is_available():
            parser.error("gpu needs a GPU, and torch sees none here; the other modes run on a CPU")
        arguments.size = arguments.autoencoder = "sd"
    print(f"U-Net {CHANNELS[arguments.size]}, {arguments.autoencoder} autoencoder, batch "
          f"{arguments.batch}, {arguments.steps} steps of which {WARM + 1} uncounted, {arguments.threads} threads, "
          f"n {arguments.rounds} rounds, torch {torch.__version__}", flush=True)  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for side in SIDES.get(arguments.mode, (SIDE,)):
            MODES[arguments.mode](Bench(Path(place) / str(side), arguments, side))


if __name__ == "__main__":
    main()
