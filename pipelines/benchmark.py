"""One picture here against one by diffusers' pipeline: same weights, start noise, steps, guidance and dtype.

Warm: both in one process, interleaved A B A B, so that whatever else the machine does falls on both alike. Cold: each
in fresh processes, import and loading included, again in turn. Ratios are seconds of the other over ours, per pair.
The cold runs also tell the most memory that each took.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.errors import GazeError, nearest
from diffusion.hub import local_path
from pipelines.request import Request
from pipelines.shipped import place_of
from pipelines.text_to_image import TextToImage

# Samplers without noise between the steps, and the diffusers class that each must agree with.
DIFFUSERS_CLASS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
}

COLD_GAZE = """
import runpy
runpy.run_module("pipelines", run_name="__main__", alter_sys=True)
"""

# The process's own most, mapped files included. `ru_maxrss` would also count what was there before the process began.
PEAK = """
import atexit, pathlib, re
status = pathlib.Path("/proc/self/status")
if status.exists():
    atexit.register(lambda: print("VmHWM", re.search(r"VmHWM:\\s+([0-9]+) kB", status.read_text())[1]))
"""

COLD_DIFFUSERS = """
import sys, torch, diffusers
folder, scheduler, prompt, steps, scale, height, width, seed, out = sys.argv[1:]
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config, clip_sample=False)
pipe.set_progress_bar_config(disable=True)
result = pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(scale), height=int(height), width=int(width),
              generator=torch.Generator().manual_seed(int(seed)))
result.images[0].save(out)
"""


def compare(
    folder: str | Path | None = None,
    prompt: str = "a red apple",
    scheduler: str = "ddim",
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    pairs: int = 15,
    cold_pairs: int = 3,
) -> dict[str, Any]:
    """Measures and returns what `table` prints: settings, warm, cold (None without cold_pairs), largest_difference.

    folder: a StableDiffusionPipeline folder; None: the shipped model. height, width: pixels; None: the model's own.
    cold has `memory` too: the most bytes that each process had at once, None where the system (not Linux) hides it.
    largest_difference: of the two float pictures, values in [0, 1]. Raises GazeError as TextToImage does.
    """
    if scheduler not in DIFFUSERS_CLASS:
        raise GazeError(
            f"scheduler {scheduler!r} cannot be compared picture by picture", nearest(scheduler, DIFFUSERS_CLASS)
        )
    folder = str(local_path(place_of(folder)))
    if Path(folder).is_file():
        raise GazeError(f"{folder} is a single file, and the comparison opens folders", f"gaze convert {folder} FOLDER")
    gaze = TextToImage.from_pretrained(folder)
    if not gaze.model.unet.config.is_diffusers:
        raise GazeError(f"{folder} has a U-Net that diffusers does not know", "another model; docs/kinds.md tells why")
    request = Request(
        prompt,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        seed=seed,
        scheduler=scheduler,
        height=height,
        width=width,
    )
    plan = gaze.plan(request)
    shape = gaze.model.autoencoder.latent_shape(plan.height, plan.width)
    latents_BCHW = torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))
    peer = _open_with_diffusers(folder, scheduler)
    options: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": plan.height,
        "width": plan.width,
        "latents": latents_BCHW,
    }

    def ours() -> Any:
        return gaze(prompt, scheduler=scheduler, **options)

    def theirs(output_type: str = "pil") -> Any:
        return peer(prompt, output_type=output_type, **options).images

    # The first run of each, which also warms it up, gives the pictures to compare.
    pixels_BCHW = (ours().pixels_BCHW / 2 + 0.5).clamp(0, 1)
    difference = np.abs(pixels_BCHW.permute(0, 2, 3, 1).numpy() - theirs("np")).max()
    warm = _measure({"gaze": ours, "diffusers": theirs}, pairs)
    return {
        "settings": {
            "model": folder,
            "prompt": prompt,
            "seed": seed,
            "scheduler": scheduler,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": plan.height,
            "width": plan.width,
            "dtype": str(next(gaze.model.unet.parameters()).dtype).removeprefix("torch."),
            "device": str(gaze.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "largest_difference": float(difference),
        "warm": warm,
        "cold": _cold(str(Path(folder).resolve()), request, plan.height, plan.width, cold_pairs)
        if cold_pairs
        else None,
    }


def _open_with_diffusers(folder: str, scheduler: str) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    # The pipeline switches clip_sample off itself, but only in the scheduler that it is made with.
    pipe.scheduler = getattr(diffusers, DIFFUSERS_CLASS[scheduler]).from_config(
        pipe.scheduler.config, clip_sample=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cold(folder: str, request: Request, height: int, width: int, n: int) -> dict[str, Any]:
    """Each from a shell's point of view: start of the process to the PNG on the disk. `import torch` is the floor."""
    steps, scale, seed = str(request.num_inference_steps), str(request.guidance_scale), str(request.seed)
    scheduler, prompt = str(request.scheduler), str(request.prompt)
    with_gaze = [
        *("generate", "--model", folder, "--scheduler", scheduler, "--steps", steps),
        *("--cfg", scale, "--size", f"{width}x{height}", "--seed", seed, "--", prompt),
    ]
    with_diffusers = [folder, DIFFUSERS_CLASS[scheduler], prompt, steps, scale, str(height), str(width), seed, "a.png"]
    memory = {}

    def start(name: str, code: str, arguments: Sequence[str] = ()) -> None:
        memory[name] = fresh_process(code, *arguments)

    runs = {
        "gaze": lambda: start("gaze", COLD_GAZE, with_gaze),
        "diffusers": lambda: start("diffusers", COLD_DIFFUSERS, with_diffusers),
        "import torch": lambda: start("import torch", "import torch"),
    }
    return {**_measure(runs, n), "memory": memory}


def fresh_process(code: str, *arguments: str) -> int | None:
    """Runs Python code in a new process and an empty folder. Returns the most bytes of memory that it had at once.

    None: the system does not tell. Raises GazeError when the process fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-c", PEAK + code, *arguments]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GazeError(f"a fresh process failed: {done.stderr.strip()[-2000:]}", "--cold-pairs 0 leaves these out")
    name, _, kilobytes = done.stdout.strip().rpartition("\n")[2].partition(" ")
    return int(kilobytes) * 1024 if name == "VmHWM" else None


def _measure(runs: dict[str, Callable[[], Any]], n: int) -> dict[str, Any]:
    """Seconds of each run, in turn, n times; medians, and per pair the ratio of each other to "gaze"."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    ratios = {name: np.divide(seconds[name], seconds["gaze"]) for name in runs if name != "gaze"}
    return {
        "n": n,
        "seconds": {name: float(np.median(values)) for name, values in seconds.items()},
        "ratio": {
            name: dict(zip(SPREAD, np.quantile(values, [0.5, 0, 0.25, 0.75, 1]).tolist(), strict=True))
            for name, values in ratios.items()
        },
    }


SPREAD = ("median", "min", "lower_quartile", "upper_quartile", "max")


def table(report: dict[str, Any]) -> str:
    """The report in a few lines of text."""
    settings = report["settings"]
    rows = [("", "other", "gaze s", "other s", "other / gaze", "min", "quartiles", "max", "n")]
    for kind in ("warm", "cold"):
        part = report[kind] or {"ratio": {}}
        for name, ratio in part["ratio"].items():
            seconds = [f"{part['seconds'][which]:.3f}" for which in ("gaze", name)]
            median, least, lower, upper, most = (f"{ratio[which]:.2f}" for which in SPREAD)
            rows.append((kind, name, *seconds, median, least, f"{lower} to {upper}", most, str(part["n"])))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    memory = {} if report["cold"] is None else report["cold"]["memory"]
    peaks = [f"{name} {most / 2**20:,.0f} MiB" for name, most in memory.items() if most is not None]
    return "\n".join(
        [
            f"{settings['prompt']!r}, seed {settings['seed']}, {settings['width']}x{settings['height']} pixels, "
            f"{settings['scheduler']}, {settings['num_inference_steps']} steps, guidance {settings['guidance_scale']}",
            f"{settings['model']}, {settings['dtype']} on {settings['device']}, {settings['threads']} threads, "
            f"torch {settings['torch']}",
            "",
            *lines,
            "",
            "seconds: medians for one picture; warm: in one process; cold: from the start of a process to the PNG",
            *([f"most memory of a cold run: {', '.join(peaks)}"] if peaks else []),
            f"largest difference of the two pictures: {report['largest_difference']:.1e} (values in [0, 1])",
        ]
    )
