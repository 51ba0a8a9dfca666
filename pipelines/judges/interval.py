"""How sure a score is: 95 % intervals of shares, of means, and of distances between two sets of pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusion.errors import GazeError

from ..evaluation import wilson

LEAST = 10  # scores of a mean: of fewer, resampling gives intervals that are much too narrow
RESAMPLES = 2000
GROUPS = 20
STUDENT = 2.0930240544083087  # the 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom


def of_share(share: float, n: float) -> dict[str, Any]:
    """score, low, high (Wilson 1927) and n of a share of n pictures."""
    low, high = wilson(share * n, n)
    return {"score": share, "low": low, "high": high, "n": n}


def enough(n: int) -> None:
    """Raises GazeError for fewer scores than `of_mean` takes; to be called before they are worked for."""
    if n < LEAST:
        raise GazeError(f"{n} {'picture is' if n == 1 else 'pictures are'} too few for an interval of their mean score",
                        f"at least {LEAST}")  # fmt: skip


def of_mean(scores: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """score, low, high and n of a mean; the interval is the percentile bootstrap's (Efron 1979), a function of the
    seed and the scores. GazeError: fewer than 10 scores."""
    n = len(scores)
    enough(n)
    scores_N, random = np.asarray(scores, dtype=np.float64), np.random.default_rng(seed)
    means = [scores_N[random.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"score": math.fsum(scores) / n, "low": float(low), "high": float(high), "n": n}


def deal(n: int, seed: int = 0) -> np.ndarray:
    """The group, of 20, of each of n pictures [n]: as equally many of each as can be."""
    return np.random.default_rng(seed).permutation(n) % GROUPS


def of_distance(distance: Callable[[np.ndarray], float]) -> dict[str, Any]:
    """score, low and high of a distance between two sets, by a grouped jackknife (Tukey 1958; Shao & Wu 1989).

    distance: of those pictures of both sets that are in the groups kept_G, a mask. From the distances with one group of
    each set left out in turn follows the variance, and the interval is Student's with 19 degrees of freedom. It tells
    how the score varies with the pictures; a bias that the distance has at this number of them stays in. Resampling
    with replacement would not do: repeated pictures make a set look less varied, so all distances become larger.
    """
    score = distance(np.ones(GROUPS, dtype=bool))
    without = [distance(np.arange(GROUPS) != group) for group in range(GROUPS)]
    reach = STUDENT * math.sqrt((GROUPS - 1) * np.var(without))
    return {"score": score, "low": score - reach, "high": score + reach}
