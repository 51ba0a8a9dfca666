"""What a run will take, before it begins: `python -m train plan CONFIG --gpu h100 --count 8 --price 2.5`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffusion.errors import GazeError
from diffusion.files import write_json
from pipelines.request import GUIDANCE, STEPS

from .config import Recipe, load_recipe
from .devices import BETWEEN_MACHINES, Device, device_here, find_device, mfu
from .muon import muon_flops
from .optimizer import parameter_groups
from .processes import Processes
from .rehearsal import memory_here, rehearse
from .workload import Cost, count, make_workload

FILE = "plan.json"  # in the run's folder
USABLE = 0.9  # of a device's memory: the rest is the driver's, kernels' own and what lies between tensors
MACHINE = 8  # devices
LAUNCH = 8e-6  # seconds until Python and torch have started a kernel
BACKWARD = 2 / 3  # share of a step's arithmetic beside which gradients can travel


def plan(recipe: Recipe, gpu: str, devices: int = 1, price: float | None = None, shard: bool = False) -> dict[str, Any]:
    """What `table` prints. gpu: a name of DEVICES, or "this" to measure this machine. price: of one for an hour.
    shard: weights, gradients, optimizer and averages lie in parts on the devices (FSDP2), instead of whole on each.

    Bytes, FLOPs and pictures per second; memory is of one device. Raises GazeError for what cannot be.
    """
    if devices < 1:
        raise GazeError(f"--count is {devices}, but a run needs a device", "--count 1")
    if price is not None and not 0 <= price < float("inf"):
        raise GazeError(f"--price is {price}", "what one device costs for an hour, such as 2.5")
    device = None if gpu == "this" else find_device(gpu)
    batch = micro_batch(recipe, devices)
    work = make_workload(recipe, torch.device("meta"))
    groups = parameter_groups(work.module, recipe.optimizer)
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    total = sum(parameter.numel() for part in (work.module, work.beside) for parameter in part.parameters())
    cost = step_cost(recipe, batch, trained, devices, shard)
    copies = 1 + (len(recipe.ema.widths) if recipe.ema.snapshots_every else 0)
    parts = devices if shard else 1
    memory = {
        "weights": 4 * (total - trained) + 4 * trained // parts,
        "optimizer": state_bytes(groups, recipe.optimizer.name) // parts,
        "averages": 4 * trained * copies // parts,
        "step": cost.bytes,
    }
    memory["peak"] = sum(memory.values())
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    memory["device"] = memory_here(here) if device is None else int(device.memory * 1e9)
    if device is None:
        times = rehearse(recipe, batch, here)
        seconds = recipe.gradient_accumulation_steps * times.micro_batch + times.update
        source = "measured here, without compile"
    else:
        seconds = step_seconds(device, recipe, cost, sum(map(muon_flops, groups)), 4 * trained, devices)
        source = f"{device.share:.0%} of its peak: {device.source}"
    speed = recipe.batch_size / seconds
    hours = recipe.pictures / speed / 3600
    return {
        "gpu": gpu,
        "count": devices,
        "sharded": shard,
        "parameters": total,
        "trained": trained,
        "flops_per_picture": cost.model_flops / batch,
        "computed_flops_per_picture": cost.flops / batch,
        "micro_batch": batch,
        "memory": memory,
        "fits": memory["peak"] <= USABLE * memory["device"],
        "pictures_per_second": speed,
        "speed_source": source,
        "days": hours / 24,
        "cost": None if price is None else hours * devices * price,
        "judges": drawn(recipe, cost) / cost.model_flops,
    }


def micro_batch(recipe: Recipe, devices: int) -> int:
    """Pictures that one device has at once; GazeError when the batch does not divide."""
    shares = devices * recipe.gradient_accumulation_steps
    if recipe.batch_size % shares:
        raise GazeError(
            f"batch_size {recipe.batch_size} does not divide by {devices} devices x "
            f"{recipe.gradient_accumulation_steps} accumulation steps",
            f"batch_size={-(-recipe.batch_size // shares) * shares}",
        )
    return recipe.batch_size // shares


def state_bytes(groups: list[dict[str, Any]], name: str) -> int:
    """Of the optimizer: two moments, one of them for Muon's matrices, in float32 or a byte each."""
    each = {"adamw": 8, "muon": 8, "adamw_8bit": 2}[name]
    return sum(parameter.numel() * (4 if group["matrices"] else each) for group in groups
               for parameter in group["params"])  # fmt: skip


def step_cost(recipe: Recipe, batch: int, trained: int, devices: int, shard: bool) -> Cost:
    """Of a micro-batch in its place: one before it has left gradients; and those of several devices travel in copies,
    unless each device keeps only its part."""
    left = recipe.gradient_accumulation_steps > 1
    cost, gradients = count(recipe, batch, keep=not (shard or left)), 4 * trained
    beside = gradients // devices if shard else gradients * (left + (devices > 1))
    return cost._replace(bytes=cost.bytes + beside)


def drawn(recipe: Recipe, cost: Cost) -> float:
    """FLOPs of what validation.judges have drawn for each micro-batch that trains: a forward for each step of a
    picture, two with guidance; as many as the recipe says or, where it does not, the pipeline makes."""
    asked, defaults = recipe.validation.judging, recipe.model.defaults
    steps = asked.num_inference_steps or defaults.get("num_inference_steps", STEPS)
    scale = defaults.get("guidance_scale", GUIDANCE) if asked.guidance_scale is None else asked.guidance_scale
    looks = -(-recipe.pictures // max(recipe.validation.looks["judges"], 1))
    pictures = len(recipe.validation.judges) * asked.prompts * looks / recipe.pictures
    return pictures * steps * (1 if scale == 1 else 2) * cost.forward_flops


def step_seconds(
    device: Device, recipe: Recipe, cost: Cost, update_flops: float, gradients: int, devices: int
) -> float:
    """Of one optimizer step. A small network takes the time that its kernels take to start. Gradients go twice around a
    ring of all devices, beside the backward pass as far as that lasts (Li et al. 2020, section 3.2)."""
    rate = device.peak(recipe.mixed_precision) * device.share
    compute = recipe.gradient_accumulation_steps * max(cost.flops / rate, cost.kernels * LAUNCH)
    link = device.link if devices <= MACHINE else min(device.link, BETWEEN_MACHINES)
    travel = 2 * gradients * (devices - 1) / devices / (link * 1e9)
    return compute + update_flops / rate + max(0.0, travel - BACKWARD * compute)


def advice(recipe: Recipe, found: Mapping[str, Any]) -> str:
    """The least change of the recipe with which a plan that does not fit would."""
    largest, steps = found["micro_batch"], recipe.gradient_accumulation_steps
    room = USABLE * found["memory"]["device"] - (found["memory"]["peak"] - found["memory"]["step"])

    def fits(batch: int, checkpointing: bool) -> bool:
        update = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": steps * largest // batch}
        changed = recipe.model_copy(update=update)
        return step_cost(changed, batch, found["trained"], found["count"], found["sharded"]).bytes <= room

    batches = [batch for batch in range(largest, 0, -1) if largest % batch == 0]
    for checkpointing in sorted({recipe.gradient_checkpointing, True}) if fits(1, True) else ():
        for batch in (batch for batch in batches if fits(batch, checkpointing)):
            words = [] if checkpointing == recipe.gradient_checkpointing else ["gradient_checkpointing=true"]
            words += [] if batch == largest else [f"gradient_accumulation_steps={steps * largest // batch}"]
            return " ".join(words)
    return "--shard on more devices, optimizer.name=adamw_8bit, or a smaller model"


def table(found: Mapping[str, Any]) -> str:
    """The plan in a few lines of text."""
    memory, price = found["memory"], found["cost"]
    parts = ", ".join(f"{name} {_gb(memory[name])}" for name in ("weights", "optimizer", "averages", "step"))
    again = found["computed_flops_per_picture"] / found["flops_per_picture"]
    lines = [
        ("parameters", f"{found['parameters']:,}, of which {found['trained']:,} train"),
        ("arithmetic", f"{found['flops_per_picture'] / 1e9:,.1f} GFLOP a picture, forward and backward"
         + (f", {again:.2f} times that with gradient checkpointing" if again > 1 else "")),
        ("memory", f"{_gb(memory['peak'])} of {_gb(memory['device'])} GB on each device ({parts})"),
        ("batch", f"{found['micro_batch']} pictures at once on each of {found['count']} x {found['gpu']}"),
        ("speed", f"{found['pictures_per_second']:,.1f} pictures per second ({found['speed_source']})"),
        ("time", f"{found['days']:,.2f} days, without validation and checkpoints"),
    ]  # fmt: skip
    if found["judges"]:
        lines.append(("judges", f"{found['judges']:.2g} times the arithmetic of training, not in the time above"))
    lines += [] if price is None else [("cost", f"{price:,.2f}")]
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g}"


def compare(recipe: Recipe, measured: Mapping[str, float], count: int) -> str:
    """How wrong the plan in recipe.out was, in a line for the end of a run; "" without a plan.

    measured: pictures_per_second, and memory (the most bytes on one device), each where it is known. count: of devices.
    """
    try:
        found = json.loads((recipe.out / FILE).read_text())
        planned = {"pictures_per_second": found["pictures_per_second"], "memory": found["memory"]["peak"]}
        same, devices = found["identity"] == recipe.identity(), found["count"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{recipe.out / FILE} cannot be read ({type(error).__name__}: {error}), so the plan is not compared"
    if not same:
        return f"{recipe.out / FILE} is the plan of another recipe, so it is not compared"
    if devices != count:
        return f"{recipe.out / FILE} is a plan for {devices} of {found['gpu']}, so it is not compared with {count}"
    return "; ".join(
        f"{name.replace('_', ' ')}: planned {planned[name]:.4g}, measured {value:.4g} "
        f"(the plan was {abs(planned[name] / value - 1):.1%} too {'high' if planned[name] > value else 'low'})"
        for name, value in measured.items()
        if name in planned and value > 0
    )


def utilization(recipe: Recipe, processes: Processes) -> Callable[[float], float | None]:
    """The run's pictures per second -> share of its devices' peak arithmetic; None where no peak is known. The
    arithmetic is counted here, in a second or some, and only by the process that writes the log."""
    if not processes.first or device_here(processes.device) is None:
        return lambda speed: None
    flops = count(recipe, 1).model_flops
    return lambda speed: mfu(flops, speed / processes.count, processes.device, recipe.mixed_precision)


def main(words: list[str]) -> int:
    """The command. Exit codes: 0, or 1 (as GazeError) when the run does not fit in memory."""
    parser = argparse.ArgumentParser(prog="python -m train plan", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--gpu", default="this", help="a device's name, such as h100; this: measure this machine")
    parser.add_argument("--count", type=int, default=1, help="devices, all machines together")
    parser.add_argument("--price", type=float, help="of one device for an hour")
    parser.add_argument("--shard", action="store_true", help="the model lies in parts on the devices (FSDP2)")
    parser.add_argument("--save", action="store_true", help="keep the plan in the run's folder; the run then prints how"
                        " wrong it was")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_intermixed_args(words)
    recipe = load_recipe(arguments.config, arguments.overrides)
    found = plan(recipe, arguments.gpu, arguments.count, arguments.price, arguments.shard)
    print(json.dumps(found, indent=2) if arguments.json else table(found))
    if arguments.save:
        write_json(recipe.out / FILE, found | {"identity": recipe.identity()})
    if not found["fits"]:
        memory = found["memory"]
        raise GazeError(
            f"the run does not fit: it takes {_gb(memory['peak'])} GB on each device, of {_gb(memory['device'])} GB "
            f"about {USABLE:.0%} can be used",
            advice(recipe, found),
        )
    return 0
