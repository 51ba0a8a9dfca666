"""Runs a training program and notes when each optimizer step ended, whoever wrote the program.

    python benchmarks/step_times.py OUT.json PROGRAM [its arguments]

PROGRAM: a script, or a module as after `python -m`. OUT.json holds lists, an item per step: "ends", seconds of the
clock; "cpu", seconds of all threads together; "parts", with --parts before PROGRAM, seconds by what they went into:
forward (of modules called from outside any other), backward, optimizer, clip, ema (ours). A step ends when the GPU has
ended it, where there is one; parts are for the CPU, where a call that has returned has ended.
"""

import atexit
import functools
import json
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.modules import module
from torch.optim import optimizer

ends: list[float] = []
cpu: list[float] = []
spent: dict[str, float] = {}
parts: list[dict[str, float]] = []


def timed(owner: Any, name: str, part: str) -> None:
    """Adds the time of each call of a method to a part."""
    plain: Callable = getattr(owner, name)

    @functools.wraps(plain)
    def call(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*arguments, **options)
        finally:
            spent[part] = spent.get(part, 0) + time.perf_counter() - begin

    setattr(owner, name, call)


def watch_forward() -> None:
    """Adds the time of calls of modules, those within another one not counted twice."""
    began: list[float] = []

    def after(*_: Any) -> None:
        begin = began.pop()
        if not began and torch.is_grad_enabled():
            spent["forward"] = spent.get("forward", 0) + time.perf_counter() - begin

    module.register_module_forward_pre_hook(lambda *_: began.append(time.perf_counter()))
    module.register_module_forward_hook(after, always_call=True)


def step_ended(stepped: Any, *_: Any) -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    spent["optimizer"] = time.perf_counter() - begun[0]
    ends.append(time.perf_counter())
    cpu.append(time.process_time())
    parts.append(dict(spent))
    spent.clear()


def main() -> None:
    _, out, program, *arguments = sys.argv
    if program == "--parts":
        program, *arguments = arguments
        watch_forward()
        timed(Accelerator, "backward", "backward")
        timed(Accelerator, "clip_grad_norm_", "clip")
        from train.ema import EMA

        timed(EMA, "update", "ema")
    optimizer.register_optimizer_step_pre_hook(lambda *_: begun.__setitem__(0, time.perf_counter()))
    optimizer.register_optimizer_step_post_hook(step_ended)
    atexit.register(lambda: Path(out).write_text(json.dumps({"ends": ends, "cpu": cpu, "parts": parts})))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path[0] = str(Path(program).parent)
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


begun = [0.0]

if __name__ == "__main__":
    main()
