"""Prompts that nobody would write: reading each, and carrying it through a PNG; prints figures.

    python benchmarks/prompts.py [--count 10000] [--length 100000] [--seed 0]

Times are of the processor; the ratio compares a prompt with its first half, over prompts of at least a millisecond.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

from PIL import Image

from diffusion.prompts import HIGHEST, LOWEST, parse
from pipelines.images import read_settings, save_png

PIECES = ["(", ")", "[", "]", "((((", "))))", ":1.3)", ":nan)", ":-5)", ":1e308)", ": ", ":" * 50, "\\", "\\(", "BREAK"]
PIECES += [
    " ",
    "B",
    "a",
    "red apple, ",
    "\u708e",
    "\u0645\u0631",
    "\u202e",
    "\U0001f469\u200d\U0001f680",
    "\x00",
    "\udcff",
    "\n",
    "1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--length", type=int, default=100_000, help="characters at most")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)

    longest, ratios, lowest, highest = 0.0, [], HIGHEST, LOWEST
    for _ in range(arguments.count):
        prompt = make(choose, arguments.length)
        seconds = timed(prompt)
        weights = [span.weight for chunk in parse(prompt[:2000]) for span in chunk.spans]
        lowest, highest = min([lowest, *weights]), max([highest, *weights])
        longest = max(longest, seconds)
        if seconds > 1e-3:
            ratios.append(seconds / timed(prompt[: len(prompt) // 2]))
    ratios.sort()
    middle = (
        f"{ratios[len(ratios) // 2]:.2f}, 99 of 100 below {ratios[len(ratios) * 99 // 100]:.2f}" if ratios else "none"
    )
    print(f"{arguments.count} prompts of up to {arguments.length} characters: all read; longest {longest * 1e3:.1f} ms")
    print(f"time of a prompt / time of its half: median {middle} (n {len(ratios)})")
    print(f"weights {lowest} to {highest}")

    same, picture = 0, Image.new("RGB", (8, 8))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.count):
            prompt = make(choose, 1000)
            save_png(picture, Path(folder) / "a.png", {"prompt": prompt})
            same += read_settings(Path(folder) / "a.png")["prompt"] == prompt
    print(f"prompt -> PNG -> prompt: {same} of {arguments.count} identical")


def make(choose: random.Random, length: int) -> str:
    """Some of the pieces, each often, or one over and over; of any length up to `length`."""
    pieces = choose.sample(PIECES, choose.randint(1, 8))
    count = int(10 ** choose.uniform(0, 5))
    return "".join(choose.choices(pieces, k=min(count, length)))[: choose.randint(0, length)]


def timed(prompt: str) -> float:
    """Processor seconds: the better of two, because a collection of garbage belongs to no prompt."""
    best = float("inf")
    for _ in range(2):
        begin = time.process_time()
        parse(prompt)
        best = min(best, time.process_time() - begin)
    return best


if __name__ == "__main__":
    main()
