"""Draws with every scheduler, from noise, from a picture and into one, with and without maps. Prints how many pictures
are bit-equal and how far a pixel's shares are from a sum of 1; ends with 1 if one is not, or more than 1e-5.

    python -m tests.long.maps
"""

import sys
import tempfile

import torch
from PIL import Image

from diffusion.errors import GazeError
from diffusion.schedulers import table
from pipelines import TextToImage
from tests.small_pipeline import small_pipeline

PICTURE = Image.radial_gradient("L").resize((32, 32)).convert("RGB")
WAYS = (
    {},
    {"image": PICTURE, "strength": 0.7},
    {"image": PICTURE, "mask_image": Image.linear_gradient("L").resize((32, 32))},
)


def main() -> int:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small_pipeline().save_pretrained(folder)
        pipe = TextToImage.from_pretrained(folder)
    fits, drawn, equal, worst = set(), 0, 0, 0.0
    for name in (row["name"] for row in table()):
        for options in WAYS:
            options = {**options, "scheduler": name, "num_inference_steps": 4, "seed": 1}
            try:
                without = pipe("a red cat", **options)
            except GazeError as error:
                print(f"{name}: {error.problem}")
                break
            result = pipe("a red cat", word_maps=True, pixel_maps=[(5, 7)], **options)
            drawn += 1
            equal += torch.equal(without.pixels_BCHW, result.pixels_BCHW)
            worst = max(worst, (result.word_maps[0].maps.sum(0) - 1).abs().max().item())
            fits.add(name)
    print(f"{len(fits)} schedulers: {equal} of {drawn} pictures bit-equal, sums at most {worst:.1e} from 1")
    return int(equal < drawn or worst > 1e-5)


if __name__ == "__main__":
    sys.exit(main())
