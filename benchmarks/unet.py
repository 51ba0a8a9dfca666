"""One guided U-Net call here and in diffusers: same weights, fp32, CPU, interleaved A B A B; prints ratios.

    python benchmarks/unet.py [FOLDER of a diffusers unet/] [--pairs 60]

Exact gains only: text keys and values and time shifts computed once per picture, one prefix for both halves of the
guidance pair, convolution weights kept in oneDNN's layout.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from diffusion.packed import pack
from diffusion.unet import UNet

SHIPPED = Path(__file__).parent.parent / "pipelines/models/emoji/unet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--pairs", type=int, default=60)
    arguments = parser.parse_args()

    import diffusers

    theirs = diffusers.UNet2DConditionModel.from_pretrained(arguments.folder).eval()
    plain = UNet.from_pretrained(arguments.folder).eval()
    packed = UNet.from_pretrained(arguments.folder).eval()
    pack(packed)
    config = plain.config
    side = config.sample_size if isinstance(config.sample_size, int) else 64
    torch.manual_seed(0)
    x_1CHW = torch.randn(1, config.in_channels, side, side)
    context_BSE = torch.randn(2, 24, config.cross_attention_dim)
    timestep = torch.tensor([500.0])

    with torch.inference_mode():
        texts, shifts = plain.project_context(context_BSE), plain.embed_time(timestep)
        runs = {
            "diffusers": lambda: theirs(x_1CHW.repeat(2, 1, 1, 1), timestep, context_BSE).sample,
            "forward": lambda: plain(x_1CHW.repeat(2, 1, 1, 1), timestep, context_BSE),
            "once per picture, shared prefix": lambda: plain.denoise(x_1CHW, shifts, texts),
            "the same, packed": lambda: packed.denoise(x_1CHW, shifts, texts),
        }
        reference = runs["diffusers"]()
        largest = reference.abs().max()
        difference = {name: float((run() - reference).abs().max() / largest) for name, run in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.pairs):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begin)

    print(f"{arguments.folder}, {side}x{side} latents, fp32, {torch.get_num_threads()} threads, n {arguments.pairs}")
    for name in runs:
        low, ratio, high = np.quantile(np.divide(seconds["diffusers"], seconds[name]), [0.25, 0.5, 0.75])
        print(f"{name:34} {ratio:5.2f} x ({low:.2f} to {high:.2f})   relative difference {difference[name]:.1e}")


if __name__ == "__main__":
    main()
