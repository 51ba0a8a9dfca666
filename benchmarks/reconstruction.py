"""How well does an autoencoder keep emoji and scenes of them? PSNR of pictures through its latents and back.

    python benchmarks/reconstruction.py [AUTOENCODER] [-n 256]

AUTOENCODER: a folder of diffusers; the shipped model's where there is none. Emoji are spread evenly over the list,
scenes are the first of seed 0. PSNR in dB: the mean of the pictures' own, the least, and how many reach 28.
"""

import argparse
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from PIL import Image

from diffusion.autoencoder import Autoencoder
from pipelines.images import to_tensor
from pipelines.scenes.things import read_things
from pipelines.scenes.world import WHITE, draw, scene
from pipelines.shipped import DEFAULT_MODEL
from train.data import emoji
from train.data.scenes import write_things

SIZES = (64, 128)
BATCH = 16
WANTED = 28.0  # dB, what a model of 128 pixels is to be made with


def emojis(n: int, size: int) -> Iterator[Image.Image]:
    found, font = emoji.installed()
    return (emoji.draw(found[number * len(found) // n].text, font, size) for number in range(n))


def scenes(n: int, size: int, white: bool) -> Iterator[Image.Image]:
    with tempfile.TemporaryDirectory() as folder:
        write_things(Path(folder))
        glyphs = {thing.name: thing.glyph for thing in read_things(folder)}
    wanted = (each for number in count() if ((each := scene([*glyphs], 0, number)).background == WHITE) == white)
    return (draw(each, glyphs, size) for each in islice(wanted, n))


PICTURES = {
    "emoji": emojis,
    "scenes on white": partial(scenes, white=True),
    "scenes on another colour": partial(scenes, white=False),
}


@torch.inference_mode()
def psnr(autoencoder: Autoencoder, images: list[Image.Image]) -> torch.Tensor:
    """Of each picture, in dB."""
    pixels_BCHW = torch.cat([to_tensor(image) for image in images])
    again_BCHW = autoencoder.decode(autoencoder.encode(pixels_BCHW)[0]).clamp(-1, 1)
    error_B = ((again_BCHW - pixels_BCHW) / 2).square().mean((1, 2, 3))
    return -10 * error_B.clamp_min(1e-12).log10()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("autoencoder", type=Path, nargs="?", default=DEFAULT_MODEL / "vae")
    parser.add_argument("-n", type=int, default=256, help="pictures of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    autoencoder = Autoencoder.from_pretrained(arguments.autoencoder)
    print(f"{'pictures':<26}{'size':>6}{'n':>6}{'PSNR, dB':>10}{'least':>8}{f'{WANTED:g} dB or more':>16}")
    for name, pictures in PICTURES.items():
        for size in SIZES:
            images = [*pictures(arguments.n, size)]
            starts = range(0, len(images), BATCH)
            found = torch.cat([psnr(autoencoder, images[start : start + BATCH]) for start in starts])
            reached = (found >= WANTED).double().mean()
            print(
                f"{name:<26}{size:>6}{len(found):>6}{found.mean():>10.2f}{found.min():>8.2f}{reached:>16.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
