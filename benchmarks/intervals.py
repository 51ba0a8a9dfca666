"""Are the intervals of `gaze evaluate` what they say? Draws scores and clouds of features again and again and counts
how often an interval holds the mean score; and how far the Frechet distance is from its formula as it stands.

    python benchmarks/intervals.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from pipelines.judges.features import compare, frechet
from pipelines.judges.interval import of_mean, of_share


def cloud(random: np.random.Generator, n: int, width: int, far: float) -> np.ndarray:
    """Features of a normal distribution with eigenvalues from 1 down to 1/width, moved and stretched by `far`."""
    return far + (1 + far) * random.normal(size=(n, width)) / np.sqrt(np.arange(1, width + 1))


def coverage(make: Callable[[np.random.Generator], dict[str, Any]], rounds: int) -> tuple[float, float, float]:
    """Share of intervals that hold the mean of all scores, that mean, and the intervals' mean width over it."""
    found = [make(np.random.default_rng(seed)) for seed in range(rounds)]
    mean = np.mean([each["score"] for each in found])
    held = np.mean([each["low"] <= mean <= each["high"] for each in found])
    return float(held), float(mean), float(np.mean([each["high"] - each["low"] for each in found]) / abs(mean))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    rounds = parser.parse_args().rounds
    cases: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {}
    for n in (10, 50, 300):
        cases[f"mean of {n} scores in 0 to 1"] = lambda random, n=n: of_mean(random.beta(5, 2, n).tolist())
        cases[f"share of {n}, 0.9"] = lambda random, n=n: of_share(random.binomial(n, 0.9) / n, n)
    for kind in ("fid", "kid"):
        for n, width, far in ((200, 16, 0.3), (1000, 16, 0.3), (200, 64, 0.3), (200, 64, 0.0)):
            cases[f"{kind}, {n} and {n} pictures, {width} features, {'apart' if far else 'alike'}"] = (
                lambda random, kind=kind, n=n, width=width, far=far: compare(
                    kind, cloud(random, n, width, 0.0), cloud(random, n, width, far)
                )
            )
    print(f"{'what':<52}{'holds the mean':>15}{'mean':>10}{'width / mean':>14}")
    for name, make in cases.items():
        held, mean, width = coverage(make, rounds)
        print(f"{name:<52}{held:>15.1%}{mean:>10.4f}{width:>14.2f}", flush=True)
    random, worst = np.random.default_rng(0), 0.0
    for width in (16, 64, 256):
        real, made = cloud(random, 2 * width, width, 0.0), cloud(random, 2 * width, width, 0.3)
        root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(made.T))
        formula = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(np.cov(real.T) + np.cov(made.T) - 2 * root.real)
        worst = max(worst, abs(frechet(real, made) / formula - 1))
    print(f"\nFrechet distance against scipy's square root of a matrix, 16 to 256 features: within {worst:.0e}")


if __name__ == "__main__":
    main()
