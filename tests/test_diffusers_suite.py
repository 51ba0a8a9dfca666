"""The runner of diffusers' own tests, on a small suite of the same shape: what passes, fails and is not applicable."""

import os
import subprocess
import sys
from pathlib import Path

COMMON = """
import unittest

class SchedulerCommonTest(unittest.TestCase):
    def dummy_model(self):
        return lambda sample, t: sample * t / (t + 1)
"""
EULER = """
import torch
from diffusers import EulerDiscreteScheduler
from .test_schedulers import SchedulerCommonTest

def plainly(s, x, first=0):
    for t in s.timesteps[first:]:
        given = s.scale_model_input(x, t)
        x = s.step(given * t / (t + 1), t, given).prev_sample
    return x

class EulerTest(SchedulerCommonTest):
    scheduler_classes = (EulerDiscreteScheduler,)

    def full_loop(self, first=0, **config):
        scheduler = self.scheduler_classes[0](**config)
        scheduler.set_timesteps(5)
        model, sample = self.dummy_model(), torch.ones(2, 3, 4, 4)
        for i, t in enumerate(scheduler.timesteps):
            sample = scheduler.scale_model_input(sample, t)
            model_output = model(sample, t)
            output = scheduler.step(model_output, t, sample)
            sample = output.prev_sample
        return sample

    def expected(self):
        scheduler = self.scheduler_classes[0]()
        scheduler.set_timesteps(5)
        return plainly(scheduler, torch.ones(2, 3, 4, 4))

    def test_right(self):
        assert (self.full_loop() - self.expected()).abs().max() < 1e-5

    def test_wrong(self):
        assert (self.full_loop() - 2 * self.expected()).abs().max() < 1e-9, "twice"

    def test_refused(self):
        self.full_loop(timestep_type="continuous")

    def test_middle(self):
        scheduler = self.scheduler_classes[0]()
        scheduler.set_timesteps(5)
        model, sample = self.dummy_model(), torch.ones(2, 3, 4, 4)
        timesteps = scheduler.timesteps[3:]
        for t in timesteps:
            sample = scheduler.scale_model_input(sample, t)
            sample = scheduler.step(model(sample, t), t, sample).prev_sample
        scheduler.set_timesteps(5)
        assert (sample - plainly(scheduler, torch.ones(2, 3, 4, 4), 3)).abs().max() < 1e-5

    def test_elsewhere(self):
        scheduler = self.scheduler_classes[0]()
        scheduler.set_timesteps(5)
        model, sample = self.dummy_model(), torch.ones(2, 3, 4, 4)
        for t in [999, 0]:
            sample = scheduler.step(model(sample, t), t, sample).prev_sample

    def test_without_a_loop(self):
        raise AssertionError
"""


def test_a_small_suite(tmp_path):
    folder = tmp_path / "tests" / "schedulers"
    folder.mkdir(parents=True)
    for name, text in (("test_schedulers", COMMON), ("test_scheduler_euler", EULER)):
        (folder / f"{name}.py").write_text(text)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    root = Path(__file__).parents[1]
    command = [sys.executable, root / "benchmarks" / "diffusers_suite.py", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    assert "| EulerDiscreteScheduler | 2 | 1 | 2 |\n| all | 2 | 1 | 2 |" in done.stdout
    assert "- AssertionError twice: EulerDiscreteScheduler.test_wrong" in done.stdout
    assert "its loop goes over other timesteps: EulerDiscreteScheduler.test_elsewhere" in done.stdout
    assert "timestep_type = 'continuous' is not supported: EulerDiscreteScheduler.test_refused" in done.stdout
