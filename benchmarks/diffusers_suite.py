"""diffusers' own tests of its schedulers, with their denoising loops run by our adapter.

    git clone --depth 1 --branch v0.40.0 https://github.com/huggingface/diffusers CHECKOUT
    python benchmarks/diffusers_suite.py CHECKOUT

Reads CHECKOUT/tests/schedulers, and for every class that fits runs the tests as they are but for the loops over
`scheduler.timesteps` with a model: each becomes one call of `drive`, with the suite's scheduler, model and start, and
its numbers must still come out. Tests without such a loop say nothing about an adapter and are left out. Prints passed,
failed and not applicable for each class, as a table in Markdown, and the reasons.
"""

import argparse
import ast
import copy
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import unittest
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusion.driver import drive
from diffusion.errors import GazeError
from diffusion.noise import NoiseSchedule
from diffusion.samplers import PictureNoise
from diffusion.schedulers import FLOWS, TABLE, prepare

# What loops go over, and the number of the first: all timesteps (the third is those that a scheduler begins with, all
# of the training), or the last of them.
BEGINS = {
    **dict.fromkeys(("scheduler.timesteps", "scheduler.prk_timesteps", "reversed(range(num_trained_timesteps))"), "0"),
    "scheduler.timesteps[3:]": "3",
    "timesteps": "len(scheduler.timesteps) - len(timesteps)",
}
OTHER = "its loop goes over other timesteps"
CLASSES = {**TABLE.classes, **FLOWS.classes}


class Record:
    """What happened in the loops of one test."""

    def __init__(self) -> None:
        self.driven = 0
        self.reasons: list[str] = []


record = Record()


class Loops(ast.NodeTransformer):
    """Turns `for t in scheduler.timesteps: ... scheduler.step(model(sample, t), t, sample)` into a call of `loop`."""

    def visit_For(self, node: ast.For) -> ast.AST | list[ast.AST]:
        self.generic_visit(node)
        calls = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
        steps = [call for call in calls if ast.unparse(call.func) in ("scheduler.step", "scheduler.step_prk")]
        enumerated = isinstance(node.iter, ast.Call) and ast.unparse(node.iter.func) == "enumerate"
        whole = node.iter.args[0] if enumerated else node.iter
        places = ast.unparse(whole)
        if places == "scheduler.plms_timesteps":
            return ast.Pass()  # `loop` went through these too
        if not steps or not any(ast.unparse(call.func) == "model" for call in calls):
            return node
        if places not in BEGINS:
            return [ast.parse("other_loop()").body[0], node]
        # Most of the suite hands `step` the network's input in place of x.
        scaled = any(ast.unparse(part).startswith("sample = scheduler.scale_model_input") for part in node.body)
        extra = [ast.unparse(argument) for argument in steps[0].args[3:]]
        extra += [f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in steps[0].keywords]
        arguments = ", ".join(["scheduler", "model", "sample", BEGINS[places], str(scaled), *extra])
        return ast.parse(f"sample = loop({arguments})").body[0]


def other_loop() -> None:
    record.reasons.append(OTHER)


def loop(
    scheduler: Any, model: Callable[..., Tensor], sample: Tensor, begin: int, scaled: bool, *extra: Any, **named: Any
) -> Tensor:
    """The suite's loop, from the timestep of number `begin` on, through the adapter. Raises GazeError for a scheduler
    that it refuses."""
    record.driven += 1
    options = dict(zip(list(inspect.signature(scheduler.step).parameters)[3:], extra, strict=False)) | named
    schedule = NoiseSchedule.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})
    prepare(scheduler, schedule, scheduler.num_inference_steps or len(scheduler.timesteps))
    row = CLASSES[type(scheduler).__name__]
    # The suite has one generator for all pictures of a batch.
    noise = PictureNoise([options.pop("generator", None) or torch.default_generator], sample.shape[1:])
    timesteps = torch.as_tensor(scheduler.timesteps, dtype=torch.float64)
    sigmas = torch.cat([schedule.sigma(timesteps), torch.zeros(1, dtype=torch.float64)])[begin:]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        level = torch.tensor(sigma, dtype=torch.float64)
        c_skip, c_out, c_in = schedule.scaling(level)
        return c_skip * x + c_out * model(c_in * x, schedule.timestep(level))

    x = sample if row.exploding else sample / schedule.scaling(sigmas[0]).c_in
    path = drive(as_the_suite(scheduler, scaled), denoise, x, sigmas, noise, schedule=schedule, exploding=row.exploding,
                 options=options)  # fmt: skip
    *_, last = path
    return last.x_BCHW


def as_the_suite(scheduler: Any, scaled: bool) -> Any:
    """A copy that is used as the suite uses it: `step` may get the network's input, and one seed is for the batch."""
    own = type(scheduler)

    @functools.wraps(own.step)
    def step(self: Any, output: Tensor, timestep: Any, sample: Tensor, *extra: Any, **named: Any) -> Any:
        return own.step(self, output, timestep, self.scale_model_input(sample, timestep), *extra, **named)

    members: dict[str, Any] = {"step": step} if scaled else {}
    if hasattr(scheduler, "noise_sampler_seed"):
        seed = scheduler.noise_sampler_seed
        members["noise_sampler_seed"] = property(lambda self: seed, lambda self, seeds: None)
    copied = copy.deepcopy(scheduler)
    copied.__class__ = type(own.__name__, (own,), members)
    return copied


class Outcome(NamedTuple):
    passed: list[str]
    failed: dict[str, str]
    other: dict[str, str]  # not applicable, and why


def run_case(case: type[unittest.TestCase]) -> Outcome:
    """Every test of a class of tests that has a loop."""
    global record
    outcome = Outcome([], {}, {})
    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        record, result = Record(), unittest.TestResult()
        problem: BaseException | None = None

        def remember(test: Any, error: Any, result: unittest.TestResult = result) -> None:
            nonlocal problem
            problem = error[1]

        result.addError = result.addFailure = remember  # type: ignore[method-assign, assignment]
        case(name).run(result)
        if isinstance(problem, GazeError):
            outcome.other[name] = problem.problem
        elif record.reasons:
            outcome.other[name] = record.reasons[0]
        elif record.driven and problem is None:
            outcome.passed.append(name)
        elif record.driven:
            outcome.failed[name] = f"{type(problem).__name__} {problem}".split("\n")[0]
    return outcome


class Rewritten(importlib.machinery.SourceFileLoader):
    """Imports a test file of the suite with its loops replaced."""

    def path_stats(self, path: str) -> Any:
        raise OSError  # so that nothing compiled is read or left in the checkout

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> types.CodeType:  # type: ignore[override]
        return compile(ast.fix_missing_locations(Loops().visit(ast.parse(data))), path, "exec", optimize=_optimize)


def load(path: Path) -> types.ModuleType:
    name = f"tests.schedulers.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=Rewritten(name, str(path)))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(loop=loop, other_loop=other_loop)
    assert spec.loader is not None
    spec.loader.exec_module(module)
    return module


def run_suite(checkout: Path) -> dict[str, Outcome]:
    """The outcomes by the name of the scheduler class."""
    sys.path.insert(0, str(checkout))
    importlib.import_module("tests.schedulers.test_schedulers")
    outcomes = {}
    for path in sorted((checkout / "tests" / "schedulers").glob("test_scheduler_*.py")):
        module = load(path)
        for case in vars(module).values():
            schedulers = getattr(case, "scheduler_classes", ())
            if isinstance(case, type) and schedulers and schedulers[0].__name__ in CLASSES:
                name = schedulers[0].__name__
                found = run_case(case)
                before = outcomes.get(name, Outcome([], {}, {}))
                outcomes[name] = Outcome(before.passed + found.passed, before.failed | found.failed,
                                         before.other | found.other)  # fmt: skip
    return outcomes


def table(outcomes: Mapping[str, Outcome]) -> str:
    head = "| class | passed | failed | not applicable |\n|---|---|---|---|"
    rows = [f"| {name} | {len(o.passed)} | {len(o.failed)} | {len(o.other)} |" for name, o in sorted(outcomes.items())]
    total = Counter(kind for o in outcomes.values() for kind, found in o._asdict().items() for _ in found)
    rows.append(f"| all | {total['passed']} | {total['failed']} | {total['other']} |")
    return "\n".join([head, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="of diffusers, with its tests/")
    outcomes = run_suite(parser.parse_args().checkout)
    print(table(outcomes))
    for heading, part in (("failed", "failed"), ("not applicable", "other")):
        reasons = defaultdict(list)
        for name, outcome in sorted(outcomes.items()):
            for test, reason in getattr(outcome, part).items():
                reasons[reason].append(f"{name}.{test}")
        print(f"\n{heading}:")
        for reason, tests in reasons.items():
            print(f"- {reason}: {', '.join(tests)}")


if __name__ == "__main__":
    main()
