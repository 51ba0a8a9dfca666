"""metrics.jsonl and what is printed beside it."""

import itertools
import json

import pytest
import torch

from tests.train.threads import together
from train.environment import note_start
from train.interval import Interval
from train.metrics import MEASURED, Metrics, Stopwatch, peak_memory
from train.processes import Processes


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"pictures": pictures, "loss": 0.5}) for pictures in (8, 16, 24)]
    path.write_text("\n".join([*lines[:2], "5", '{"loss": 1}', '{"pictures": "x"}', *lines[2:], '{"pictures": 2']))
    with Metrics(path, 16, 32, active=True) as metrics:
        assert path.read_text().splitlines() == lines[:2]
        metrics.log(24, loss=0.25)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["pictures"] for row in found] == [8, 16, 24]
    assert found[2]["loss"] == 0.25
    assert found[2]["pictures_per_second"] > 0


def test_sums_since_the_last_line_go_on_in_any_number_of_processes():
    def begun(processes):
        interval = Interval(processes)
        for _ in range(3):
            interval.add(torch.tensor([0.1, 0.3][processes.rank]), [0.25, 0.5][processes.rank])
        return interval.state_dict()

    def resumed(processes):
        interval = Interval(processes)
        interval.load_state_dict(json.loads(json.dumps(saved[0])))
        return interval.state_dict()

    saved = together(2, begun)
    assert together(2, resumed) == saved == [saved[0]] * 2
    for count in (1, 3):
        for state in together(count, resumed):
            assert state["steps"] == 3
            assert state["sums"] == [pytest.approx([0.6, 1.125])] * count


def test_figures_without_new_pictures_have_no_speed(tmp_path, capsys):
    with Metrics(tmp_path / "metrics.jsonl", 0, 32, active=True) as metrics:
        metrics.log(16, loss=0.5)
        metrics.log(16, psnr=20.0)
        metrics.log(32, loss=0.5)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["pictures_per_second" in row for row in rows] == [True, False, True]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines()[1] == "16/32 pictures  psnr 20"
    assert printed.err.splitlines()[0].startswith("16/32 pictures  loss 0.5  pictures_per_second")
    assert printed.err.splitlines()[2].endswith("0.0 min left")


def test_only_one_process_writes(tmp_path, capsys):
    with Metrics(tmp_path / "metrics.jsonl", 0, 32, active=False) as metrics:
        metrics.advance(8)
        metrics.log(8, loss=0.5)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert capsys.readouterr().err == ""


def test_speed_and_shares_are_of_steps_alone(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 4.0, 9.0, 29.0, 69.0, 70.0, 70.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    processor = iter([3.0, 13.0])
    monkeypatch.setattr("time.process_time", lambda: next(processor))
    with Metrics(tmp_path / "metrics.jsonl", 0, 80, active=True, mfu=lambda speed: speed / 100) as metrics:
        for name in ("data", "forward", "backward", "validation", "checkpoint"):
            metrics.watch.lap(name)
        metrics.log(40, loss=0.5)
        metrics.log(40, psnr=1.0)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first.pop("peak_memory_gb") > 0
    assert first == {
        "pictures": 40, "loss": 0.5, "pictures_per_second": 4.0, "mfu": 0.04, "time/data": 0.1, "time/forward": 0.3,
        "time/backward": 0.5, "time/trainer": 0.1, "seconds/validation": 20.0, "seconds/checkpoint": 40.0,
        "seconds/cpu_a_picture": 0.25,
    }  # fmt: skip
    assert second == {"pictures": 40, "psnr": 1.0}
    assert all(name.startswith(MEASURED) for name in first if name not in ("pictures", "loss"))
    assert "time/" not in capsys.readouterr().err


def test_a_lap_reads_the_clock_once_and_none_is_lost(monkeypatch):
    readings = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: next(readings))
    watch = Stopwatch()
    for name in ("data", "forward") * 50:
        watch.lap(name)
    assert watch.read() == {"data": 50, "forward": 50, "trainer": 1}
    assert next(readings) == 102
    assert watch.read() == {"trainer": 2}


def test_peak_memory_is_of_this_process():
    before = peak_memory(torch.device("cpu"))
    held = torch.ones(before // 4 + 80_000_000)  # 320 MB more than ever
    assert peak_memory(torch.device("cpu")) - before > 2e8
    assert len(held) > 80_000_000


def test_a_line_that_cannot_be_written_is_a_warning(tmp_path):
    metrics = Metrics(tmp_path / "none" / "metrics.jsonl", 0, 80, active=True)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl cannot be written.*the run goes on"):
        metrics.log(8, loss=0.5)


def test_each_start_is_noted_with_what_it_runs_on(tmp_path):
    for pictures in (0, 16):
        note_start(tmp_path, pictures, Processes())
    note_start(tmp_path, 24, NotFirst(1, 2))
    first, second = (json.loads(line) for line in (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (first["pictures"], second["pictures"], first["processes"]) == (0, 16, 1)
    assert first["torch"] == torch.__version__
    assert "cpu" in first["devices"][0]


class NotFirst(Processes):
    def gather(self, value):
        return [value, value]
