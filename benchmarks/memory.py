"""The most memory that one picture takes from the start of a process: here and through diffusers, in turn.

    python benchmarks/memory.py [FOLDER] [--steps 2] [--size 512] [--dtype float32 --dtype bfloat16]

FOLDER: a StableDiffusionPipeline folder; without it, one of Stable Diffusion 1.5's structure and random weights is made
for as long as this runs (4.3 GB of disk). Each run opens the model, makes one picture with guidance and writes it. The
peak is what Linux notes as the process's own (VmHWM of /proc/self/status): all pages that it had at once, mapped files
included. No time is measured.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from diffusion.autoencoder import Autoencoder, AutoencoderConfig
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.files import read_json, write_json
from diffusion.pretrained import model_index
from diffusion.structure import SCHEDULE
from diffusion.unet import UNet, UNetConfig
from pipelines.benchmark import fresh_process
from pipelines.shipped import DEFAULT_MODEL

GAZE = """
import sys, torch
from pipelines import TextToImage
folder, dtype, steps, size = sys.argv[1:]
pipe = TextToImage.from_pretrained(folder, dtype=getattr(torch, dtype))
options = dict(scheduler="ddim", num_inference_steps=int(steps), guidance_scale=7.5, height=int(size), width=int(size))
pipe("a castle", seed=0, **options).images[0].save("a.png")
"""
DIFFUSERS = """
import sys, torch, diffusers
folder, dtype, steps, size = sys.argv[1:]
pipe = diffusers.StableDiffusionPipeline.from_pretrained(
    folder, torch_dtype=getattr(torch, dtype), safety_checker=None, local_files_only=True
)
options = dict(num_inference_steps=int(steps), guidance_scale=7.5, height=int(size), width=int(size))
pipe("a castle", generator=torch.Generator().manual_seed(0), **options).images[0].save("a.png")
"""


def make(folder: Path) -> None:
    """A model of Stable Diffusion 1.5's structure with fresh weights and the shipped model's words."""
    torch.manual_seed(0)
    levels = (128, 256, 512, 512)
    vae = AutoencoderConfig(
        block_out_channels=levels,
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    write_json(folder / "model_index.json", model_index("StableDiffusionPipeline", "DDIMScheduler"))
    write_json(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler", **SCHEDULE})
    shutil.copytree(DEFAULT_MODEL / "tokenizer", folder / "tokenizer")
    words = folder / "tokenizer" / "tokenizer_config.json"
    write_json(words, read_json(words) | {"model_max_length": text.max_position_embeddings})
    UNet(UNetConfig(sample_size=64, cross_attention_dim=768)).save_pretrained(folder / "unet")
    Autoencoder(vae).save_pretrained(folder / "vae")
    CLIPText(text).initialize().save_pretrained(folder / "text_encoder")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model" if arguments.folder is None else arguments.folder.resolve()
        if arguments.folder is None:
            make(folder)
        print(f"one picture of {arguments.size}x{arguments.size}, {arguments.steps} steps with guidance, CPU")
        for dtype in arguments.dtype or ["float32", "bfloat16"]:
            for name, code in (("gaze", GAZE), ("diffusers", DIFFUSERS)):
                peak = fresh_process(code, str(folder), dtype, str(arguments.steps), str(arguments.size))
                print(f"{dtype:9} {name:10} {'unknown' if peak is None else f'{peak / 2**30:.2f} GiB'}", flush=True)


if __name__ == "__main__":
    main()
