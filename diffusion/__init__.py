"""Latent diffusion: the model and its mathematics. Each name loads its module on first use, so importing is quick."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import GazeError

if TYPE_CHECKING:
    from .condition import Condition
    from .denoiser import Denoiser
    from .noise import NoiseSchedule
    from .samplers import SAMPLERS, sampler
    from .unet import UNet, UNetConfig

MODULES = {
    "Condition": "condition",
    "Denoiser": "denoiser",
    "NoiseSchedule": "noise",
    "SAMPLERS": "samplers",
    "UNet": "unet",
    "UNetConfig": "unet",
    "sampler": "samplers",
}

__all__ = ["SAMPLERS", "Condition", "Denoiser", "GazeError", "NoiseSchedule", "UNet", "UNetConfig", "sampler"]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
