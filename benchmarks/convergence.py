"""How the error of each deterministic sampler falls with its steps, where the right answer is known.

    python benchmarks/convergence.py [--plot docs/convergence.svg]

Pictures of one pixel from a mixture of three normal distributions: the best denoiser is a formula, and where the
probability flow ends is known from an integrator of eighth order that chooses its own steps (scipy's DOP853, relative
error 1e-13). Levels are even in log sigma, from 10 to 0.05; those of flow-matching models are even in time, from pure
noise at time 1. The order is how many times the error halves where the steps double, from 160 to 320. Prints a table in
Markdown.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.methods import Method
from diffusion.noise import flow_sigma
from diffusion.samplers import FLOW_SAMPLERS, SAMPLERS, Sampler


class Case(NamedTuple):
    """A sampler and its method, with its options."""

    sampler: Sampler
    method: Method
    flow: bool = False


METHODS = {
    "euler": Case(SAMPLERS["euler"], SAMPLERS["euler"].integrate),
    "ddim": Case(SAMPLERS["ddim"], SAMPLERS["ddim"].integrate),
    "heun": Case(SAMPLERS["heun"], SAMPLERS["heun"].integrate),
    "dpmpp_2m": Case(SAMPLERS["dpmpp_2m"], SAMPLERS["dpmpp_2m"].integrate),
    "dpmpp_3m_sde:eta=0": Case(SAMPLERS["dpmpp_3m_sde"], partial(SAMPLERS["dpmpp_3m_sde"].integrate, eta=0.0)),
    "unipc": Case(SAMPLERS["unipc"], SAMPLERS["unipc"].integrate),
    "euler (flow)": Case(FLOW_SAMPLERS["euler"], FLOW_SAMPLERS["euler"].integrate, flow=True),
    "heun (flow)": Case(FLOW_SAMPLERS["heun"], FLOW_SAMPLERS["heun"].integrate, flow=True),
}
STEPS = (5, 10, 20, 40, 80, 160, 320)
FIRST, LAST = 10.0, 0.05
STARTS_B = torch.tensor([-14.0, -6.0, 1.0, 5.0, 12.0], dtype=torch.float64)
# Weight, mean and variance of the parts of the mixture.
PARTS = torch.tensor([[0.5, -1.0, 0.1], [0.2, 0.2, 0.3], [0.3, 1.2, 0.2]], dtype=torch.float64)


def denoise(x_B: Tensor, sigma: float) -> Tensor:
    """The mean of all pictures that noise of level sigma turns into x: of each part (variance * x + sigma^2 * mean) /
    (variance + sigma^2), and of these by how likely x is from each."""
    weight_M, mean_M, variance_M = PARTS.unbind(1)
    total_M = variance_M + sigma**2
    log_BM = weight_M.log() - total_M.log() / 2 - (x_B[:, None] - mean_M) ** 2 / (2 * total_M)
    clean_BM = (variance_M * x_B[:, None] + sigma**2 * mean_M) / total_M
    return (log_BM.softmax(1) * clean_BM).sum(1)


def right_answer() -> Tensor:
    """Where the probability flow dx / d log(sigma) = x - denoise(x, sigma) takes each start."""

    def slope(level: float, x_B: np.ndarray) -> np.ndarray:
        return x_B - denoise(torch.from_numpy(x_B), math.exp(level)).numpy()

    ends = (math.log(FIRST), math.log(LAST))
    return integral(slope, ends, STARTS_B)


def right_flow() -> Tensor:
    """The same in the frame of flow-matching models, from STARTS_B / FIRST at time 1: dx / dt = (x - clean) / t."""

    def slope(time: float, x_B: np.ndarray) -> np.ndarray:
        sigma = flow_sigma(torch.tensor(time)).item()
        return (x_B - denoise(torch.from_numpy(x_B) * (1 + sigma), sigma).numpy()) / time

    return integral(slope, (1.0, LAST / (1 + LAST)), STARTS_B / FIRST) * (1 + LAST)


def integral(slope: Callable[[float, np.ndarray], np.ndarray], ends: tuple[float, float], starts_B: Tensor) -> Tensor:
    flow = solve_ivp(slope, ends, starts_B.numpy(), method="DOP853", rtol=1e-13, atol=1e-13)
    return torch.from_numpy(flow.y[:, -1])


def errors(case: Case, steps: tuple[int, ...] = STEPS) -> list[float]:
    """The largest error over all starts, for each number of steps."""
    exact_B = right_flow() if case.flow else right_answer()
    found = []
    for count in steps:
        even = torch.linspace(math.log(FIRST), math.log(LAST), count + 1, dtype=torch.float64).exp()
        times = torch.linspace(1, LAST / (1 + LAST), count + 1, dtype=torch.float64)
        sigmas = flow_sigma(times) if case.flow else even
        x_B = STARTS_B / FIRST * (1 + sigmas[0]) if case.flow else STARTS_B
        *_, last = case.method(denoise, x_B, sigmas.tolist(), lambda: torch.zeros_like(STARTS_B))
        found.append((last.x_BCHW - exact_B).abs().max().item())
    return found


def table(results: dict[str, list[float]]) -> str:
    rows = [
        f"| `{name}` | {math.log2(found[-2] / found[-1]):.2f} | {' | '.join(f'{error:.1e}' for error in found)} |"
        for name, found in results.items()
    ]
    head = ["sampler", "order measured", *(f"{count} steps" for count in STEPS)]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows])


def plot(results: dict[str, list[float]]) -> str:
    """Errors over network calls, both logarithmic, as an SVG."""
    colors = ("#888888", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#d62728", "#8c564b", "#e377c2")
    left, top, width, height = 60, 20, 560, 360
    calls = {name: [METHODS[name].sampler.calls_per_step * count for count in STEPS] for name in results}
    low, high = -9, 0  # powers of ten of the error

    def place(count: float, error: float) -> str:
        across = (math.log2(count) - math.log2(STEPS[0])) / math.log2(2 * STEPS[-1] / STEPS[0])
        up = (min(max(math.log10(error), low), high) - low) / (high - low)
        return f"{left + across * width:.1f},{top + (1 - up) * height:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 160} {top + height + 50}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for power in range(low, high + 1):
        x, y = place(STEPS[0], 10.0**power).split(",")
        parts.append(f'<line x1="{x}" y1="{y}" x2="{left + width}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">1e{power}</text>')
    for count in (*STEPS, 2 * STEPS[-1]):
        x, _ = place(count, 1.0).split(",")
        parts.append(f'<text x="{x}" y="{top + height + 18}" text-anchor="middle">{count}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 40}" text-anchor="middle">network calls</text>')
    for i, ((name, found), color) in enumerate(zip(results.items(), colors, strict=True)):
        points = " ".join(place(*point) for point in zip(calls[name], found, strict=True))
        dashes = ' stroke-dasharray="6 4"' if name == "ddim" else ""  # on the line of euler
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"{dashes}/>')
        parts.append(f'<text x="{left + width + 10}" y="{top + 20 + 20 * i}" fill="{color}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    results = {name: errors(case) for name, case in METHODS.items()}
    print(table(results))
    if arguments.plot is not None:
        arguments.plot.write_text(plot(results))


if __name__ == "__main__":
    main()
