"""What edits, inversion and excite do to pictures of a model; prints three tables.

    python benchmarks/edits.py [--model FOLDER] [--steps 20] [--seeds 20] [--only edits inversion excite]

Edits: the root of the mean squared difference of pixels in [0, 1] between the source and the target, drawn alone and
with the source's attention; the seeds are spread over the pairs of prompts. Inversion: the PSNR of a picture redrawn
against it after the autoencoder, by rounds of each step; the pictures are drawn by the model and pass through 8 bits.
Excite: the strongest attention of the word that has least, mean over steps, and the ratio of time, interleaved.
"""

import argparse
import statistics
import time

import torch

from diffusion.denoiser import Denoiser, Predictor
from diffusion.excite import coarse, strongest
from diffusion.words import words_of
from pipelines import TextToImage
from pipelines.edit import edit
from pipelines.request import Request

PAIRS = [
    ("grinning face", "crying face"),
    ("man running: dark skin tone", "woman running: dark skin tone"),
    ("red heart", "blue heart"),
    ("grinning cat", "crying cat"),
]
SHARES = [(0.8, 0.4), (1.0, 0.8)]
ROUNDS = (1, 2, 3, 5)
NAMED = [
    ("dog face and red heart", ["dog", "heart"]),
    ("man and cat", ["man", "cat"]),
    ("tree and moon", ["tree", "moon"]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    arguments = parser.parse_args()
    pipe = TextToImage.from_pretrained(arguments.model)
    for part in arguments.only:
        PARTS[part](pipe, arguments.steps, arguments.seeds)


def edits(pipe: TextToImage, steps: int, seeds: int) -> None:
    print(f"{'cross, self':<14}{'alone':>8}{'edited':>8}{'difference':>18}  nearer   n")
    rows: dict[tuple[float, float], list[tuple[float, float]]] = {shares: [] for shares in SHARES}
    for seed in range(seeds):
        source, target = PAIRS[seed % len(PAIRS)]
        alone = far(edit(pipe, source, target, 0.0, 0.0, seed=seed, num_inference_steps=steps).pixels_BCHW)
        for shares in SHARES:
            made = edit(pipe, source, target, *shares, seed=seed, num_inference_steps=steps)
            rows[shares].append((alone, far(made.pixels_BCHW)))
    for shares, row in rows.items():
        less = [before - after for before, after in row]
        error = 1.96 * statistics.stdev(less) / len(less) ** 0.5
        alone, edited = (statistics.mean(column) for column in zip(*row, strict=True))
        nearer = sum(each > 0 for each in less)
        gain = f"{statistics.mean(less):.4f} +- {error:.4f}"
        print(f"{shares[0]}, {shares[1]:<9}{alone:8.4f}{edited:8.4f}{gain:>18}  {nearer:>6}  {len(less):>2}")


def far(pixels_BCHW: torch.Tensor) -> float:
    a, b = pixels_BCHW.clamp(-1, 1) / 2
    return (a - b).square().mean().sqrt().item()


def inversion(pipe: TextToImage, steps: int, seeds: int) -> None:
    print(f"{'rounds':<8}{'PSNR, dB':>10}{'least':>8}  n")
    pictures = [
        (PAIRS[seed % len(PAIRS)], pipe(PAIRS[seed % len(PAIRS)][0], seed=seed).images[0]) for seed in range(seeds)
    ]
    for rounds in ROUNDS:
        found = []
        for (source, target), image in pictures:
            made = edit(pipe, source, target, image=image, rounds=rounds, num_inference_steps=steps)
            assert made.psnr is not None
            found.append(made.psnr["autoencoder"])
        print(f"{rounds:<8}{statistics.mean(found):10.1f}{min(found):8.1f}  {len(found)}")


def excited(pipe: TextToImage, steps: int, seeds: int) -> None:
    print(f"{'excite':<8}{'strongest attention':>20}{'seconds':>9}  n")
    rows: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for seed in range(seeds):
        prompt, named = NAMED[seed % len(NAMED)]
        for on in rows:
            options = {"seed": seed, "num_inference_steps": steps, "excite": named if on else None}
            begin = time.perf_counter()
            pipe(prompt, **options)
            seconds = time.perf_counter() - begin
            rows[on].append((attention(pipe, prompt, named, options), seconds))
    for on, row in rows.items():
        share, seconds = (statistics.mean(column) for column in zip(*row, strict=True))
        print(f"{'on' if on else 'off':<8}{share:20.4f}{seconds:9.2f}  {len(row)}")
    ratios = [on[1] / off[1] for off, on in zip(*rows.values(), strict=True)]
    print(f"time, on / off: {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


def attention(pipe: TextToImage, prompt: str, named: list[str], options: dict) -> float:
    words = words_of(pipe.model.text.read(prompt), pipe.model.text.window)
    tokens = [[words.tokens(*words.numbers(word)) for word in named]]
    places, found = coarse(pipe.model.unet), []

    def around(denoiser: Denoiser, rows: list[int]):
        alone = denoiser.alone

        def denoise(x_BCHW, sigma):
            level = torch.tensor([sigma], dtype=torch.float64)
            predict = Predictor(alone.unet, alone.schedule, alone.condition, level, None)
            input_BCHW = alone.schedule.scaling(level[0]).c_in * x_BCHW
            found.append(strongest(places, predict, input_BCHW, sigma, tokens).min().item())
            return denoiser(x_BCHW, sigma)

        return denoise

    for _ in pipe.run(pipe.plan(Request(prompt, **options)), around):
        pass
    return statistics.mean(found)


PARTS = {"edits": edits, "inversion": inversion, "excite": excited}

if __name__ == "__main__":
    main()
