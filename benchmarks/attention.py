"""What word maps cost: one picture of Stable Diffusion 1.5's structure with and without them, in turn; prints ratios.

    python benchmarks/attention.py maps [FOLDER] [--steps 1] [--size 512] [--rounds 5]

FOLDER: a StableDiffusionPipeline folder; without it, one of random weights is made for as long as this runs (4.3 GB of
disk). Every cross-attention and every step is recorded and the maps of each step are kept; pictures are not decoded,
which is the same on both sides. The two take turns, one thread each; times are the process's own processor time. What
of it went into reading the weights and adding them up is measured inside as well ("recording"), because the ratio of
two long times has the noise of the machine in it. Memory: the peaks of two fresh processes.

    python benchmarks/attention.py unused [FOLDER of a U-Net] [--rounds 40]

The seam when it is not used: calls of the U-Net with every seam put in and taken out again before, against calls of
one that never had any. Both should run the same code.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import memory  # of this folder
import numpy as np
import torch

from diffusion.attention_maps import Recorder
from diffusion.attention_sites import attending, sites
from diffusion.unet import UNet
from pipelines import TextToImage
from pipelines.benchmark import fresh_process
from pipelines.shipped import DEFAULT_MODEL

PROMPT = "a photograph of an astronaut riding a white horse on the moon"
ONCE = """
import sys, torch
from pipelines import TextToImage
torch.set_num_threads(1)
folder, steps, size, maps = sys.argv[1:]
pipe = TextToImage.from_pretrained(folder)
options = dict(num_inference_steps=int(steps), height=int(size), width=int(size), word_maps=maps == "maps")
for preview in pipe.steps("a castle", seed=0, map_each_step=maps == "maps", **options):
    preview.word_maps
"""


def spread(ratios: np.ndarray) -> str:
    low, middle, high = np.quantile(ratios, [0, 0.5, 1])
    return f"{middle:.4f} ({low:.4f} to {high:.4f}), n {len(ratios)}"


def cost_of_maps(folder: Path, steps: int, size: int, rounds: int) -> None:
    pipe = TextToImage.from_pretrained(folder)
    inside = [0.0]
    for name in ("_record", "end_step"):
        measured(name, inside)
    options = {"num_inference_steps": steps, "height": size, "width": size, "seed": 0}
    with_maps = {**options, "word_maps": True, "map_each_step": True}
    seconds: dict[str, list[float]] = {"plain": [], "maps": []}
    recording, last = [], {}
    for _ in range(rounds):
        for name, side in seconds.items():
            begin, inside[0] = time.process_time(), 0.0
            for preview in pipe.steps(PROMPT, **(with_maps if name == "maps" else options)):
                last[name] = preview
            side.append(time.process_time() - begin)
            print(f"{name}: {side[-1]:.2f} s, recording {inside[0]:.3f} s", file=sys.stderr, flush=True)
        recording.append(inside[0])
    equal = torch.equal(last["plain"].step.x_BCHW, last["maps"].step.x_BCHW)
    (maps,) = last["maps"].word_maps
    held = maps.held_WHW.nbytes + maps.held_TWHW.nbytes
    print(f"{size}x{size}, {steps} steps with guidance, one thread, {len(maps.words)} words; seconds: the median")
    for name, side in seconds.items():
        print(f"{name:12} {np.median(side):8.2f} s   of plain: {spread(np.divide(side, seconds['plain']))}")
    share = np.divide(recording, seconds["plain"])
    print(f"{'recording':12} {1000 * np.median(recording):8.0f} ms  of plain: {spread(share)}")
    print(f"latents bit-equal: {equal}; maps held: {held / 1e6:.2f} MB, as shown: {maps.maps.nbytes / 1e6:.2f} MB")
    peaks = {side: fresh_process(ONCE, str(folder), str(steps), str(size), side) for side in ("plain", "maps")}
    if None not in peaks.values():
        more = (peaks["maps"] - peaks["plain"]) / 2**20
        print(f"peak of a process: {peaks['plain'] / 2**20:.0f} MiB, with maps {more:+.0f} MiB")


def measured(name: str, total: list[float]) -> None:
    """Has a method of the recorder add its processor time to the total."""
    method = getattr(Recorder, name)

    def timed(*arguments: object) -> object:
        begin = time.process_time()
        result = method(*arguments)
        total[0] += time.process_time() - begin
        return result

    setattr(Recorder, name, timed)


def cost_when_unused(folder: Path, rounds: int) -> None:
    never, before = UNet.from_pretrained(folder).eval(), UNet.from_pretrained(folder).eval()
    config = never.config
    side = config.sample_size if isinstance(config.sample_size, int) else 64
    generator = torch.Generator().manual_seed(0)
    x_BCHW = torch.randn(1, config.in_channels, side, side, generator=generator)
    context_BSE = torch.randn(2, 24, config.cross_attention_dim, generator=generator)
    seconds: dict[str, list[float]] = {"never": [], "before": []}
    with torch.inference_mode():
        texts, shifts = never.project_context(context_BSE), never.embed_time(500.0)
        with attending(sites(before), lambda site, usual, *tensors: usual(*tensors)):
            before.denoise(x_BCHW, shifts, texts)
        for turn in range(2 * rounds):
            for name, unet in (("never", never), ("before", before))[:: 1 if turn % 2 else -1]:
                begin = time.process_time()
                unet.denoise(x_BCHW, shifts, texts)
                seconds[name].append(time.process_time() - begin)
    low, middle, high = np.quantile(np.divide(seconds["before"], seconds["never"]), [0.25, 0.5, 0.75])
    print(f"{folder}, {side}x{side} latents, one thread: seams taken out again, of never there: {middle:.4f} "
          f"(quartiles {low:.4f} to {high:.4f}), n {2 * rounds}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["maps", "unused"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "unused":
        cost_when_unused(arguments.folder or DEFAULT_MODEL / "unet", arguments.rounds or 40)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model" if arguments.folder is None else arguments.folder.resolve()
        if arguments.folder is None:
            memory.make(folder)
        cost_of_maps(folder, arguments.steps, arguments.size, arguments.rounds or 5)


if __name__ == "__main__":
    main()
