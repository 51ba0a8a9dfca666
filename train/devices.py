"""What a device can do at most, and how much of that training a U-Net reaches."""

from __future__ import annotations

from typing import NamedTuple

import torch

from diffusion.errors import GazeError, nearest

MLPERF = "MLPerf Training 4.0, Stable Diffusion 2 on 8 H100: 137 to 152 pictures per second and GPU"
MOSAIC = "MosaicML 2023, Stable Diffusion 2 on A100: 36 pictures of 512 pixels per second and GPU"
ASSUMED = "no published run; the A100's share is taken"


class Device(NamedTuple):
    """half, single: most TFLOP/s in bf16 or fp16 with float32 sums, dense, and in float32 (the maker's data sheet).
    memory: GB. link: GB/s to a neighbour in the same machine, one way. share: of `half` that training reaches; source:
    where that comes from."""

    half: float
    single: float
    memory: float
    link: float
    share: float
    source: str

    def peak(self, mixed_precision: str) -> float:
        """FLOP/s at most."""
        return 1e12 * (self.single if mixed_precision == "no" else self.half)


DEVICES = {
    "b200": Device(2250, 75, 180, 900, 0.37, f"taken as the H100's ({MLPERF})"),
    "h200": Device(989, 67, 141, 450, 0.37, f"the H100's arithmetic ({MLPERF})"),
    "h100": Device(989, 67, 80, 450, 0.37, MLPERF),
    "a100": Device(312, 19.5, 80, 300, 0.28, MOSAIC),
    "a100-40gb": Device(312, 19.5, 40, 300, 0.28, MOSAIC),
    "l40s": Device(362, 91.6, 48, 32, 0.28, ASSUMED),
    "l4": Device(121, 30.3, 24, 32, 0.28, ASSUMED),
    "rtx4090": Device(165, 82.6, 24, 32, 0.28, ASSUMED),
    "rtx3090": Device(71, 35.6, 24, 32, 0.28, ASSUMED),
}
BETWEEN_MACHINES = 400.0  # GB/s of a machine one way: 8 adapters of 400 Gbit/s


def find_device(name: str) -> Device:
    """By its name in DEVICES; GazeError with the nearest one else."""
    if name not in DEVICES:
        raise GazeError(f"no device is called {name!r}", nearest(name, [*DEVICES, "this"]))
    return DEVICES[name]


def device_here(device: torch.device) -> Device | None:
    """The row of a device of this machine, by what its driver calls it; None for a CPU or one that is not listed."""
    if device.type != "cuda":
        return None
    called = torch.cuda.get_device_name(device).lower().replace(" ", "").replace("geforce", "")
    found = [name for name in DEVICES if all(part in called for part in name.split("-"))]
    return DEVICES[max(found, key=len)] if found else None


def mfu(
    flops_per_picture: float, pictures_per_second: float, device: torch.device, mixed_precision: str = "bf16"
) -> float | None:
    """Model FLOPs utilization (Chowdhery et al. 2022, appendix B): the share of one device's peak that the model's
    arithmetic takes, recomputation not counted. pictures_per_second: of that device. None where no peak is known."""
    row = device_here(device)
    return None if row is None else flops_per_picture * pictures_per_second / row.peak(mixed_precision)
