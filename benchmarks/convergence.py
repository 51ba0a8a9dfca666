"""How the error of each deterministic scheduler falls with its steps, where the right answer is known.

    python benchmarks/convergence.py [--plot docs/convergence.svg]

A picture of five pixels from a mixture of three normal distributions: the best denoiser is a formula, and the
probability flow is known from an integrator of eighth order that chooses its own steps (scipy's DOP853, relative error
1e-13). Each scheduler is prepared by its name, starts on that flow at the first of its levels, and is compared with it
at the last of them above 0, in float64. Levels of a table are even in log sigma, from 10 to 0.05, with trailing
spacing; those of flow-matching models are the usual ones, even in time, from (nearly) pure noise. The numbers of steps
divide the training timesteps, because some of diffusers' classes visit whole ones only. The order is how many times the
error halves where the steps double, from 40 to 160: with more steps the float32 levels of diffusers' classes show.
Prints a table in Markdown.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from diffusion.foreign import Foreign
from diffusion.noise import NoiseSchedule, flow_sigma
from diffusion.samplers import PictureNoise, Sampler
from diffusion.schedulers import EDMS, FLOWS, TABLE, prepare

STEPS = (10, 20, 40, 80, 160, 320)
COARSE, FINE = 40, 160  # between which the order is measured
FIRST, LAST = 10.0, 0.05
STARTS_P = torch.tensor([-14.0, -6.0, 1.0, 5.0, 12.0], dtype=torch.float64)  # P pixels
# Weight, mean and variance of the parts of the mixture.
PARTS = torch.tensor([[0.5, -1.0, 0.1], [0.2, 0.2, 0.3], [0.3, 1.2, 0.2]], dtype=torch.float64)
TIMESTEPS = 8 * STEPS[-1]
# diffusers' solvers for flows go from the last but one timestep, and cut each to a whole number: many, and one more.
FLOW_TIMESTEPS = 256 * STEPS[-1] + 1


class Case(NamedTuple):
    """A scheduler's name, as `prepare` takes it, what it stands for, and the model it is measured on."""

    scheduler: str
    method: Sampler | Foreign
    levels: Callable[[], NoiseSchedule]

    @property
    def flow(self) -> bool:
        return self.levels is flow_levels


def cases() -> dict[str, Case]:
    """Every deterministic scheduler: of models with a table of levels and of flow-matching models, ours first; and
    diffusers' for EDM's scalings, where ours do what they do with a table."""
    found = {}
    for samplers, foreign, model in (
        (TABLE.samplers, TABLE.foreign, levels),
        (FLOWS.samplers, FLOWS.foreign, flow_levels),
        ({}, EDMS.foreign, edm_levels),
    ):
        for name, method in {**samplers, **dict(sorted(foreign.items()))}.items():
            # What has an order of its own only where its noise is off.
            written = f"{name}:eta=0" if name == "dpmpp_3m_sde" else name
            if written != name or not method.stochastic:
                found[written + " (flow)" * (model is flow_levels)] = Case(written, method, model)
    return found


def denoise(x: Tensor, sigma: float) -> Tensor:
    """The mean of all pictures that noise of level sigma turns into x (any shape): of each part (variance * x +
    sigma^2 * mean) / (variance + sigma^2), and of these by how likely x is from each."""
    weight_M, mean_M, variance_M = PARTS.unbind(1)
    total_M = variance_M + sigma**2
    log_M = weight_M.log() - total_M.log() / 2 - (x[..., None] - mean_M) ** 2 / (2 * total_M)
    clean_M = (variance_M * x[..., None] + sigma**2 * mean_M) / total_M
    return (log_M.softmax(-1) * clean_M).sum(-1)


@cache
def right_path() -> Callable[[float], Tensor]:
    """The probability flow dx / d log(sigma) = x - denoise(x, sigma) through STARTS_P, as a function of sigma."""

    def slope(level: float, x_P: np.ndarray) -> np.ndarray:
        return x_P - denoise(torch.from_numpy(x_P), math.exp(level)).numpy()

    path = integral(slope, (math.log(FIRST) + 0.01, math.log(LAST) - 0.01), STARTS_P)
    return lambda sigma: torch.from_numpy(path(math.log(sigma)))


@cache
def right_flow() -> Callable[[float], Tensor]:
    """The same in the frame of flow-matching models, from STARTS_P / FIRST at time 1: dx / dt = (x - clean) / t."""

    def slope(time: float, x_P: np.ndarray) -> np.ndarray:
        sigma = flow_sigma(torch.tensor(time)).item()
        return (x_P - denoise(torch.from_numpy(x_P) * (1 + sigma), sigma).numpy()) / time

    path = integral(slope, (1.0, 0.9 / FLOW_TIMESTEPS), STARTS_P / FIRST)
    return lambda sigma: torch.from_numpy(path(sigma / (1 + sigma))) * (1 + sigma)


def integral(
    slope: Callable[[float, np.ndarray], np.ndarray], ends: tuple[float, float], starts_P: Tensor
) -> Callable[[float], np.ndarray]:
    path: Callable[[float], np.ndarray] = solve_ivp(
        slope, ends, starts_P.numpy(), method="DOP853", rtol=1e-13, atol=1e-13, dense_output=True
    ).sol
    return path


@cache
def levels() -> NoiseSchedule:
    """A table that is even in log sigma, from LAST to FIRST."""
    signal_T = 1 / (1 + torch.linspace(math.log(LAST), math.log(FIRST), TIMESTEPS, dtype=torch.float64).exp() ** 2)
    betas_T = 1 - signal_T / torch.cat([torch.ones(1, dtype=torch.float64), signal_T[:-1]])
    config = {"num_train_timesteps": TIMESTEPS, "timestep_spacing": "trailing", "trained_betas": betas_T.tolist()}
    return NoiseSchedule.from_config(config)


@cache
def flow_levels() -> NoiseSchedule:
    """Those of a flow-matching model without a shift."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": FLOW_TIMESTEPS}
    return NoiseSchedule.from_config(config)


@cache
def edm_levels() -> NoiseSchedule:
    """Those of a model with EDM's scalings, even in log sigma from LAST to FIRST."""
    config = {
        "_class_name": "EDMEulerScheduler",
        "sigma_schedule": "exponential",
        "sigma_min": LAST,
        "sigma_max": FIRST,
    }
    return NoiseSchedule.from_config(config)


METHODS = cases()


def errors(case: Case, steps: tuple[int, ...] = STEPS) -> list[float]:
    """The largest error of the pixels, for each number of steps."""
    schedule, exact = case.levels(), right_flow() if case.flow else right_path()
    noise = PictureNoise([torch.Generator()], STARTS_P.shape)
    found = []
    for count in steps:
        trajectory = prepare(case.scheduler, schedule, count)
        *_, last, _ = trajectory.run(denoise, exact(float(trajectory.sigmas[0]))[None], noise=noise)
        found.append((last.x_BCHW - exact(last.sigma)).abs().max().item())
    return found


def order(coarse: float, fine: float) -> float:
    """How many times the error halves where the steps double, from its values for COARSE and FINE steps."""
    return math.log2(coarse / fine) / math.log2(FINE / COARSE)


def table(results: dict[str, list[float]]) -> str:
    coarse, fine = STEPS.index(COARSE), STEPS.index(FINE)
    rows = [
        f"| `{name}` | {order(found[coarse], found[fine]):.1f} | {' | '.join(f'{error:.1e}' for error in found)} |"
        for name, found in results.items()
    ]
    head = ["scheduler", "order", *(f"{count} steps" for count in STEPS)]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows])


COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#555555", "#a8a800", "#17becf",
          "#000080", "#00a060")  # fmt: skip
LEFT, TOP, WIDTH, HEIGHT, GAP = 60, 40, 520, 400, 80
LOW, HIGH = -7, 0  # powers of ten of the error


def place(calls: float, error: float) -> tuple[float, float]:
    """Where a panel has a point, from its corner, both axes logarithmic."""
    across = math.log2(calls / STEPS[0]) / math.log2(2 * STEPS[-1] / STEPS[0])
    up = (min(max(math.log10(error), LOW), HIGH) - LOW) / (HIGH - LOW)
    return round(across * WIDTH, 1), round((1 - up) * HEIGHT, 1)


def groups(results: dict[str, list[float]]) -> list[list[str]]:
    """Names whose errors agree within 5 % up to FINE steps have one line; the largest error first."""
    found: list[list[str]] = []
    upto = STEPS.index(FINE) + 1
    for name in sorted(results, key=lambda name: -results[name][upto - 1]):
        for group in found:
            pairs = zip(results[name][:upto], results[group[0]][:upto], strict=True)
            if all(math.isclose(*pair, rel_tol=0.05) for pair in pairs):
                group.append(name)
                break
        else:
            found.append([name])
    return found


def panel(title: str, results: dict[str, list[float]]) -> list[str]:
    """Errors over network calls; the names beside in the order of the lines at FINE steps."""
    parts = [f'<text x="0" y="-14" font-weight="bold">{title}</text>']
    for power in range(LOW, HIGH + 1):
        _, y = place(STEPS[0], 10.0**power)
        parts.append(f'<line x1="0" y1="{y}" x2="{WIDTH}" y2="{y}" stroke="#dddddd"/>')
        parts.append(f'<text x="-8" y="{y + 4}" text-anchor="end">1e{power}</text>')
    for count in (*STEPS, 2 * STEPS[-1]):
        x, _ = place(count, 1.0)
        parts.append(f'<text x="{x}" y="{HEIGHT + 18}" text-anchor="middle">{count}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT + 38}" text-anchor="middle">network calls</text>')
    row = 0
    for group, color in zip(groups(results), cycle(COLORS), strict=False):
        calls = map(METHODS[group[0]].method.calls, STEPS)
        points = " ".join("{},{}".format(*place(*point)) for point in zip(calls, results[group[0]], strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        for name in group:
            row += 1
            parts.append(f'<text x="{WIDTH + 16}" y="{20 * row - 8}" fill="{color}">{METHODS[name].scheduler}</text>')
    return parts


def plot(results: dict[str, list[float]]) -> str:
    """A panel for each kind of model, as an SVG."""
    kinds = (("models with a table of noise levels", False), ("flow-matching models", True))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 290} {2 * (TOP + HEIGHT) + GAP + 20}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (title, flow) in enumerate(kinds):
        shown = {name: found for name, found in results.items() if METHODS[name].flow == flow}
        parts += [f'<g transform="translate({LEFT},{TOP + i * (HEIGHT + GAP)})">', *panel(title, shown), "</g>"]
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
