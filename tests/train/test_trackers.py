"""Trackers: what TensorBoard gets, and that none of them stops or slows a run."""

import json
import threading
import warnings

import pytest
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from diffusion.errors import GazeError
from tests.train.tiny import make_pictures, make_vae, newest_files, run_here, tiny_recipe
from train import trackers
from train.metrics import Metrics
from train.trackers import CAPACITY, check_trackers, finish, open_trackers


class Recording(GeneralTracker):
    """A tracker that remembers; its subclasses misbehave."""

    name = "recording"
    requires_logging_directory = False
    release = threading.Event()

    def __init__(self, run_name):
        super().__init__()
        self.heard = []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.heard.append(values)

    def log(self, values, step=None, **options):
        self.heard.append((step, values))
        self.answer()

    def answer(self): ...


class Failing(Recording):
    def answer(self):
        raise OSError("no such server")


class Leaving(Recording):
    def start(self):
        raise SystemExit(1)


class Missing(Recording):
    def start(self):
        raise ModuleNotFoundError("No module named 'wandb_core'")


class Blocking(Recording):
    def answer(self):
        self.release.wait()


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Trackers of one of the classes above, and what they were made as."""
    PartialState(cpu=True)
    made = []

    def open_one(kind):
        monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, kind.name, lambda *words: made.append(kind(*words)) or made[-1])
        monkeypatch.setattr(LOGGER_TYPE_TO_CLASS[kind.name], "requires_logging_directory", False, raising=False)
        return open_trackers(tiny_recipe(tmp_path, tmp_path, trackers=[kind.name]), 0), made

    Recording.release.clear()
    yield open_one
    Recording.release.set()


def test_tensorboard_gets_figures_pictures_and_the_recipe(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    PartialState(cpu=True)
    recipe = tiny_recipe(tmp_path, tmp_path, trackers=["tensorboard"], optimizer={"learning_rate": 0.125})
    for start, end in ((0, 4), (2, 4)):  # killed after 4 pictures, resumed from 2
        opened = open_trackers(recipe, start)
        with Metrics(tmp_path / "metrics.jsonl", start, 4, active=True, trackers=opened) as metrics:
            for seen in range(start + 1, end + 1):
                metrics.log(seen, loss=seen / 10 + start, **{"held_out_loss/sigma_0.5": 2.0})
                metrics.picture(seen, Image.new("RGB", (5, 3), "red"))
    events = EventAccumulator(str(tmp_path / "trackers" / "gaze"))
    events.Reload()
    losses = [(event.step, round(event.value, 5)) for event in events.Scalars("loss")]
    assert losses == [(1, 0.1), (2, 0.2), (3, 2.3), (4, 2.4)]
    assert {"held_out_loss/sigma_0.5", "pictures_per_second", "time/trainer"} <= set(events.Tags()["scalars"])
    shown = events.Images("samples")[0]
    assert (shown.width, shown.height) == (5, 3)
    settings = next((tmp_path / "trackers" / "gaze").glob("*/hparams.yml")).read_text()
    assert "optimizer.learning_rate: 0.125" in settings


def test_rows_arrive_in_order_and_before_the_end(opened):
    started, made = opened(Recording)
    for seen in range(20):
        started[0].log(seen, {"loss": 0.5})
    finish(started)
    settings, *rows = made[0].heard
    assert settings["phase"] == "autoencoder"
    assert rows == [(seen, {"loss": 0.5}) for seen in range(20)]


@pytest.mark.parametrize(
    "kind, says",
    [
        (Failing, "recording failed: OSError: no such server"),
        (Leaving, "recording cannot start: SystemExit"),
        (Missing, "recording cannot start: ModuleNotFoundError: No module named 'wandb_core'"),
    ],
)
def test_one_that_fails_is_warned_of_once_and_the_run_goes_on(opened, tmp_path, kind, says):
    started, made = opened(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Metrics(tmp_path / "metrics.jsonl", 0, 80, active=True, trackers=started) as metrics:
            for seen in (8, 16, 24):
                metrics.log(seen, loss=0.5)
    assert [str(warning.message).startswith(f"tracker {says}") for warning in caught] == [True]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    if kind is Failing:
        assert len(made[0].heard) == 4  # it may work again


def test_one_that_blocks_for_ever_costs_nothing_and_is_left_behind(opened, monkeypatch, tmp_path):
    started, _ = opened(Blocking)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seen in range(5 * CAPACITY):
            started[0].log(seen, {"loss": 0.5})
            started[0].picture(seen, Image.new("RGB", (4, 4)))
        assert started[0].waiting.qsize() <= CAPACITY
        finish(started, 0.01)
    assert started[0].thread.is_alive(), "it still takes the first row, and nobody has waited for that"
    (warning,) = caught
    assert str(warning.message).startswith("tracker recording does not keep up")


def test_all_that_block_at_the_end_are_waited_for_so_long_together_and_no_longer(opened, monkeypatch):
    started = [opened(Blocking)[0][0] for _ in range(3)]
    clock, waited = [100.0], []

    def join(seconds):
        waited.append(seconds)
        clock[0] += 0.75

    monkeypatch.setattr(trackers.time, "monotonic", lambda: clock[0])
    for tracker in started:
        tracker.log(8, {"loss": 0.5})
        monkeypatch.setattr(tracker.thread, "join", join)
    with pytest.warns(UserWarning, match="has not taken all in time"):
        finish(started, 1.0)
    assert waited == [1.0, 0.25, 0]


def test_a_name_that_nobody_knows_or_a_tracker_that_is_missing_ends_the_run_before_it_begins(monkeypatch):
    with pytest.raises(GazeError, match="no tracker 'tensorbord'") as error:
        check_trackers(["tensorbord"])
    assert "did you mean 'tensorboard'?" in error.value.hint
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(GazeError, match="swanlab is not installed") as error:
        check_trackers(["tensorboard", "swanlab"])
    assert error.value.hint.startswith("pip install swanlab")
    check_trackers(["tensorboard"])
    check_trackers([])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recording", Recording)
    check_trackers(["recording"])


def test_a_run_feeds_its_trackers_and_changes_no_bit(tmp_path):
    pictures, vae = make_pictures(tmp_path / "pictures"), make_vae(tmp_path / "vae")
    found = []
    for names in ((), ("tensorboard",)):
        recipe = tiny_recipe(tmp_path / f"run{len(names)}", pictures, vae, pictures=16, trackers=names)
        run_here(recipe)
        found.append(newest_files(recipe.out)["model-00000.safetensors"])
    assert found[0] == found[1]
    assert list((recipe.out / "trackers" / "gaze").glob("events*"))
    row = json.loads((recipe.out / "metrics.jsonl").read_text())
    assert {"time/data", "time/forward", "time/backward", "time/optimizer", "time/trainer"} <= row.keys()
    assert sum(value for name, value in row.items() if name.startswith("time/")) == pytest.approx(1)
    with pytest.raises(GazeError, match="no tracker 'tensorbord'"):
        run_here(recipe.model_copy(update={"out": tmp_path / "none", "trackers": ("tensorbord",)}))
    assert not (tmp_path / "none").exists()
