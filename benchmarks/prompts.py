"""Prompts that nobody would write: reading each, and carrying it through a PNG; prints figures.

    python benchmarks/prompts.py [--count 10000] [--length 100000] [--seed 0]

Times are of the processor, tokenizing with the shipped model included, in CLIP's window of 77 tokens instead of its
own 24; the ratio compares a prompt said twice with the prompt, where that takes at least a millisecond. An error ends
the run.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from diffusion.prompts import HIGHEST, LOWEST
from diffusion.text import Reading, TextEncoder
from pipelines.parameters import NEGATIVE, read_parameters, write_parameters
from pipelines.png import read_settings, read_texts, save_png
from pipelines.shipped import DEFAULT_MODEL

PIECES = ["(", ")", "[", "]", "((((", "))))", ":1.3)", ":nan)", ":-5)", ":1e308)", ": ", ":" * 50, "\\", "\\(", "BREAK"]
PIECES += ["\u708e", "\u0645\u0631", "\u202e", "\U0001f469\u200d\U0001f680", "\x00", "\udcff", "\n", "1"]
PIECES += [" ", "B", "a", "red apple, ", '"', NEGATIVE, "Steps: 20, Sampler: Euler a, Seed: 1"]
SETTINGS = {"scheduler": "ddim", "num_inference_steps": 20, "guidance_scale": 2.0, "seed": 0, "width": 64, "height": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=100_000, help="characters at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    text = TextEncoder.from_pretrained(DEFAULT_MODEL / "text_encoder", DEFAULT_MODEL / "tokenizer")
    text.window = 77

    times, ratios, lowest, highest = [], [], HIGHEST, LOWEST
    for _ in range(arguments.count):
        prompt = make(choose, arguments.length)
        reading, seconds = timed(text.read, prompt, 2)
        weights = [weight for chunk in reading.chunks for weight in chunk.weights]
        lowest, highest = min([lowest, *weights]), max([highest, *weights])
        times.append(seconds)
        if seconds > 1e-3:
            ratios.append(growth(text.read, prompt))
    print(
        f"{arguments.count} prompts of up to {arguments.length} characters: all read; "
        f"longest {max(times) * 1e3:.1f} ms, mean {sum(times) / len(times) * 1e3:.1f} ms"
    )
    ratios = sorted(ratios) or [0.0]
    middle = ratios[len(ratios) // 2]
    print(
        f"time of a prompt said twice / of the prompt: median {middle:.2f}, largest {ratios[-1]:.2f} (n {len(ratios)})"
    )
    print(f"weights {lowest} to {highest}")

    same, promised, theirs, picture = 0, 0, 0, Image.new("RGB", (8, 8))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.png"
        for _ in range(arguments.count):
            settings = {**SETTINGS, "prompt": make(choose, 1000)}
            save_png(picture, path, settings, write_parameters(settings))
            same += read_settings(path) == settings
            if keeps(settings["prompt"]):
                found, _ = read_parameters(read_texts(path)["parameters"])
                promised += 1
                theirs += found == settings | {"negative_prompt": ""}
    print(f"prompt -> PNG -> prompt: {same} of {arguments.count} identical")
    print(f"through the web UI's text alone, where that can say it: {theirs} of {promised} identical")


def keeps(prompt: str) -> bool:
    """Whether the web UI's text can say a prompt: no line begins or ends with space or begins with its keyword for the
    negative prompt, none is empty at either end, and no letter is a NUL or a single surrogate."""
    lines = prompt.split("\n")
    trimmed = all(line == line.strip() and not line.startswith(NEGATIVE) for line in lines)
    return (
        trimmed and prompt == prompt.strip() and prompt == prompt.encode("utf-8", "ignore").decode().replace("\0", "")
    )


def make(choose: random.Random, length: int) -> str:
    """Some of the pieces, each often, or one over and over; of any length up to `length`."""
    pieces = choose.sample(PIECES, choose.randint(1, 8))
    count = int(10 ** choose.uniform(0, 5))
    return "".join(choose.choices(pieces, k=min(count, length)))[: choose.randint(0, length)]


def growth(read: Callable[[str], Reading], prompt: str) -> float:
    """The time of a prompt said twice over that of the prompt, in turns, measured anew where something else seems to
    have been in the way."""
    for rounds in (2, 20):
        pairs = [(timed(read, prompt * 2, 1)[1], timed(read, prompt, 1)[1]) for _ in range(rounds)]
        ratio = min(twice for twice, _ in pairs) / min(once for _, once in pairs)
        if ratio < 2.2:
            break
    return ratio


def timed(read: Callable[[str], Reading], prompt: str, rounds: int) -> tuple[Reading, float]:
    """What is read, and processor seconds: the best of some, because a collection of garbage belongs to no prompt."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        reading = read(prompt)
        best = min(best, time.process_time() - begin)
    return reading, best


if __name__ == "__main__":
    main()
