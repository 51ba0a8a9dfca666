"""Post-hoc averages of the weights (Karras et al. 2024, "EDM2", section 3 and appendix C).

While a run goes on, a few averages whose weighting is a power of the time, `tau^gamma`, are kept and now and then
stored. Afterwards the average of nearly any width is a sum of stored ones, with coefficients by least squares. Time is
pictures seen; a width is the deviation of the weighting relative to the time, sigma_rel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusion.errors import GazeError
from diffusion.files import replacing_file, save_tensors

from .ema import Average
from .sharding import whole

# Half the disk of float32; the rounding, 2^-12 of a weight, stays below what the coefficients make of the misfit.
STORED = torch.float16
MISFIT = 0.05  # of the weighting wanted, Euclidean and relative: above it a width counts as out of reach
WIDTHS = np.arange(0.005, 0.2851, 0.001)


class PowerAverages:
    """The averages of recipe.ema.widths for the trained parameters of `module`."""

    def __init__(self, module: nn.Module, widths: Sequence[float]) -> None:
        self.averages = {width: Average(module, partial(power_decay, exponent(width))) for width in widths}

    def update(self, pictures: int, batch_size: int) -> None:
        """After an optimizer step over `batch_size` pictures, `pictures` in all so far."""
        for average in self.averages.values():
            average.update(pictures, batch_size)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{width}/{name}": value
            for width, average in self.averages.items()
            for name, value in average.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """state: as `EMA.load_state_dict` takes it."""
        for width, average in self.averages.items():
            average.load_state_dict({name: state[f"{width}/{name}"] for name in average.average})

    def store(self, folder: Path, pictures: int, identity: str, first: bool = True) -> None:
        """Writes folder/PICTURES.safetensors, whole or not at all. Every process must call, the first one writes.

        identity: of the run, which `reconstruct` does not mix with another. Raises OSError when it cannot be written.
        """
        tensors = {}
        for name, value in self.state_dict().items():
            full = whole(value)
            if first:
                tensors[name] = full.to("cpu", STORED).contiguous()
        if not first:
            return
        with replacing_file(folder / f"{pictures:012d}.safetensors") as aside:
            save_tensors(tensors, aside, {"identity": identity})
            with aside.open("rb") as file:
                os.fsync(file.fileno())


def power_decay(gamma: float, pictures: int, batch_size: int) -> float:
    """What remains of the average at an update, so that each step counts as the integral of tau^gamma over it."""
    return ((pictures - batch_size) / pictures) ** (gamma + 1)


def exponent(width: float) -> float:
    """gamma of a width: the real root of width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (their algorithm 2)."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


class Profile(NamedTuple):
    """The weighting of an average up to `time`, (gamma + 1) / time^(gamma + 1) * tau^gamma, which integrates to 1."""

    time: float
    gamma: float


def product(one: Profile, other: Profile) -> float:
    """The integral of the product of two weightings (their algorithm 3)."""
    early, late = sorted((one, other))
    scale = (one.gamma + 1) * (other.gamma + 1) / (one.gamma + other.gamma + 1)
    return scale / late.time * (early.time / late.time) ** late.gamma


def fit(profiles: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """The coefficients whose sum of `profiles` is nearest to the one wanted, and how far that is, relative to it."""
    products = np.array([[product(one, other) for other in profiles] for one in profiles])
    target = np.array([product(one, wanted) for one in profiles])
    coefficients = np.linalg.lstsq(products, target, rcond=1e-12)[0]
    own = product(wanted, wanted)
    apart = own - 2 * coefficients @ target + coefficients @ products @ coefficients
    return coefficients, float(np.sqrt(max(apart, 0.0) / own))


def reconstruct(folder: Path, width: float, identity: str) -> tuple[int, dict[str, Tensor]]:
    """The weights averaged with `width` up to the newest snapshot in `folder`, after the pictures seen there.

    Raises GazeError when snapshots are missing, broken or not of the run of this identity, or cannot express the width.
    """
    paths = sorted(folder.glob("[0-9]*.safetensors"))
    if not paths:
        raise GazeError(f"{folder} holds no snapshots", "a run with ema.snapshots_every, or export without --ema-width")
    try:
        return _reconstruct(paths, width, identity)
    except (OSError, SafetensorError, ValueError) as error:
        raise GazeError(f"a snapshot in {folder} cannot be read: {error}", "remove it, if others remain") from None


def _reconstruct(paths: Sequence[Path], width: float, identity: str) -> tuple[int, dict[str, Tensor]]:
    files = {int(path.stem): safe_open(path, "pt") for path in paths}
    found = {
        path.name: (file.metadata() or {}).get("identity") for path, file in zip(paths, files.values(), strict=True)
    }
    other = [name for name, theirs in found.items() if theirs != identity]
    if other:
        raise GazeError(f"{paths[0].parent} holds snapshots of another run: {', '.join(other[:3])}", "remove them")
    names: dict[tuple[int, str], list[str]] = {}  # of the tensors in each average
    for pictures, file in files.items():
        for key in file.keys():  # noqa: SIM118 - no dict
            stored, name = key.split("/", 1)
            names.setdefault((pictures, stored), []).append(name)
    profiles = [Profile(pictures, exponent(float(stored))) for pictures, stored in names]
    newest = max(files)
    coefficients, misfit = fit(profiles, Profile(newest, exponent(width))) if 0 < width < WIDTHS[-1] else ((), 1.0)
    if misfit > MISFIT:
        raise GazeError(
            f"the {len(files)} snapshots in {paths[0].parent} do not express an average of width {width:g}",
            f"--ema-width {reach(profiles, newest)}; more snapshots (ema.snapshots_every) reach further",
        )
    total: dict[str, Tensor] = {}
    for (pictures, stored), coefficient in zip(names, coefficients, strict=True):
        for name in names[pictures, stored]:
            value = files[pictures].get_tensor(f"{stored}/{name}").float() * coefficient
            total[name] = total[name] + value if name in total else value
    return newest, total


def reach(profiles: Sequence[Profile], time: int) -> str:
    """The widths that they express, in words: the stretches of WIDTHS whose misfit is small."""
    fits = [fit(profiles, Profile(time, exponent(width)))[1] <= MISFIT for width in WIDTHS]
    return " or ".join(f"{first:.3f} to {last:.3f}" for first, last in _stretches(fits))


def _stretches(fits: Sequence[bool]) -> Iterator[tuple[float, float]]:
    edges = np.flatnonzero(np.diff([False, *fits, False]))
    for first, after in edges.reshape(-1, 2):
        yield float(WIDTHS[first]), float(WIDTHS[after - 1])
