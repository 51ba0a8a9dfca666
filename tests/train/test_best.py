"""Scores while a run goes on, and the best model: a function of the weights, harmless, and whole after any kill."""

import json
import os
import shutil
import signal

import pytest
import torch
from torch import nn

from diffusion.errors import GazeError
from pipelines.evaluation import wilson
from pipelines.shipped import DEFAULT_MODEL
from tests.train.test_validation import Together
from tests.train.tiny import newest_files, rows, run_here, tiny_recipe
from train import loop
from train.best import FILE, FOLDER, check_kept, judge, keep, recover
from train.config import Validation
from train.ema import EMA
from train.judges import Judge
from train.loop import Stopped
from train.metrics import Metrics
from train.processes import Processes
from train.run import export

JUDGED = {"judges": ["shapes"], "judging": {"every": 8, "prompts": 6, "batch": 4, "num_inference_steps": 1}}


class Small:
    """A phase whose judge marks picture i by a bit of its one weight, which draws from the global generator."""

    def __init__(self, weight=0b1010110):
        self.module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5))
        nn.init.constant_(self.module[0].weight, weight)
        self.asked = []
        self.judges = {"shapes": Judge(["one", "two"] * 4 + ["one"], self.marks)}

    def marks(self, numbers):
        assert not any(part.training for part in self.module.modules())
        self.asked.append([*numbers])
        torch.rand(3)
        weight = round(float(self.module[0].weight))
        return [float(weight >> number & 1) for number in numbers]

    def export(self, folder):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "weight").write_text(f"{float(self.module[0].weight)}")


@pytest.fixture
def recipe(tmp_path):
    return lambda **judging: tiny_recipe(
        tmp_path, tmp_path, tmp_path, validation={**JUDGED, "judging": {"every": 8, "batch": 4, **judging}}
    )


def look(recipe, phase, seen=16, processes=Processes(), stopping=lambda: False, times=1.0):  # noqa: B008
    """A look whose averaged weights are `times` the weights."""
    ema = EMA(phase.module, 10)
    for average in ema.average.values():
        average.mul_(times)
    with Metrics(recipe.out / "metrics.jsonl", 0, 80, processes.first) as metrics:
        return judge(recipe, phase, "identity", ema, processes, metrics, seen, stopping)


def kept(out):
    return json.loads((out / FOLDER / FILE).read_text()) | {"weight": (out / FOLDER / "unet" / "weight").read_text()}


# A look


def test_the_figures_are_of_the_averaged_weights_and_nothing_else_is_touched(recipe):
    phase = Small(0b10101)
    phase.module.train()
    state = torch.get_rng_state()
    assert look(recipe(), phase, times=9)  # 0b10111101
    expected = {"pictures": 16, "shapes": 0.675, "shapes/one": 0.6, "shapes/two": 0.75}
    assert rows(recipe().out)[0] == pytest.approx(expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert phase.module.training
    assert phase.module[0].weight.item() == 0b10101
    found = kept(recipe().out)
    assert (found["by"], found["score"], found["n"], found["pictures"]) == ("shapes", pytest.approx(0.675), 9, 16)
    assert (found["low"], found["high"]) == pytest.approx(wilson(0.675 * 9, 9))
    assert found["weight"] == "189.0"


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_processes_finds_the_same_with_equally_many_calls(recipe, count):
    phases = [Small() for _ in range(count)]
    found = Together(count).run(lambda processes: look(recipe(), phases[processes.rank], processes=processes))
    assert found == [True] * count
    assert rows(recipe().out)[0]["shapes"] == pytest.approx((3 / 5 + 1 / 4) / 2)
    asked = [phase.asked for phase in phases]
    assert {len(batches) for batches in asked} == {-(-3 // count)}
    assert {tuple(batch) for batches in asked for batch in batches} == {(0, 1, 2, 3), (4, 5, 6, 7), (8,)}


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_a_stop_leaves_no_half_of_anything(recipe, rounds):
    asked = iter([False] * rounds)
    assert not look(recipe(), Small(), stopping=lambda: next(asked, True))
    assert [*recipe().out.iterdir()] == []


def test_what_does_not_fit_into_memory_is_left_out(recipe):
    phase = Small()

    def full(numbers):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    phase.judges = {"shapes": Judge(["one"] * 6, full), "others": phase.judges["shapes"]}
    with pytest.warns(UserWarning, match=r"smaller validation\.judging\.batch"):
        assert look(recipe(), phase)
    assert rows(recipe().out)[0].keys() == {"pictures", "others", "others/one", "others/two"}
    assert not (recipe().out / FOLDER).exists()


@pytest.mark.filterwarnings("ignore:the judge shapes fails")
@pytest.mark.parametrize("count", [1, 3])
def test_a_judge_that_fails_is_left_out_and_the_run_goes_on(recipe, count):
    def odd(numbers):
        if 4 in numbers:
            raise ValueError("an odd picture")
        return [0.0] * len(numbers)

    phases = [Small() for _ in range(count)]
    for phase in phases:
        phase.judges = {"shapes": Judge(["one"] * 9, odd), "others": phase.judges["shapes"]}
    found = Together(count).run(lambda processes: look(recipe(), phases[processes.rank], processes=processes))
    assert found == [True] * count
    assert rows(recipe().out)[0].keys() == {"pictures", "others", "others/one", "others/two"}
    with pytest.warns(UserWarning, match="the judge shapes fails and is left out: ValueError: an odd picture; the run"):
        look(recipe(), phases[0])


# What is kept


def test_the_best_stays_until_weights_score_as_much(recipe):
    out = recipe().out
    for seen, weight, now in ((8, 0b1, 8), (16, 0b111, 16), (24, 0b11, 16), (32, 0b1110, 32), (40, 0, 32)):
        look(recipe(), Small(weight), seen)
        assert kept(out)["pictures"] == now
    assert kept(out)["weight"] == "14.0"
    look(recipe(seed=3), Small(0), 48)
    assert kept(out)["pictures"] == 48, "scores of other pictures do not compare"
    look(recipe(seed=3, best="shapes/two", every=4), Small(0), 56)
    assert kept(out)["by"] == "shapes/two"
    look(recipe(seed=3, best="shapes/two", every=8), Small(0b10), 64)
    look(recipe(seed=3, best="shapes/two", every=8), Small(0b101011101), 72)
    assert (kept(out)["pictures"], kept(out)["score"], kept(out)["n"]) == (72, 0.25, 4)


def test_a_model_of_another_run_does_not_compare(recipe):
    look(recipe(), Small(0b111))
    found = recipe().out / FOLDER / FILE
    found.write_text(found.read_text().replace('"identity": "identity"', '"identity": "another"'))
    look(recipe(), Small(0), 24)
    assert kept(recipe().out)["pictures"] == 24


def test_where_it_cannot_be_written_the_one_before_stays(recipe, monkeypatch):
    look(recipe(), Small(0b1))

    def full(folder):
        (folder / "unet").mkdir()
        raise OSError(28, "No space left on device")

    phase = Small(0b11)
    phase.export = full
    with pytest.warns(UserWarning, match="best cannot be written.*No space left.*the run goes on"):
        assert look(recipe(), phase, 24)
    assert kept(recipe().out)["pictures"] == 16
    assert sorted(path.name for path in recipe().out.iterdir()) == [FOLDER, "metrics.jsonl"]


@pytest.mark.parametrize("content", ["{", None])
def test_what_a_stranger_puts_there_meanwhile_ends_no_run(recipe, content):
    look(recipe(), Small(0b1))
    found = recipe().out / FOLDER / FILE
    found.unlink() if content is None else found.write_text(content)
    with pytest.warns(UserWarning, match=r"best cannot be written: .*the run goes on"):
        assert look(recipe(), Small(0b11), 24)
    assert (recipe().out / FOLDER / "unet" / "weight").read_text() == "1.0"


FOUND = {"by": "shapes", "score": 0.5, "settings": {}, "identity": ""}


def write(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "weight").write_text("new")


def be_killed_at_rename(out, number):
    """Keeps a better model in a process that is killed before rename number `number`, counted from 0."""
    rename = os.rename

    def renamed(*names):
        nonlocal number
        if not number:
            os.kill(os.getpid(), signal.SIGKILL)
        number -= 1
        rename(*names)

    os.rename = renamed
    keep(out / FOLDER, write, FOUND | {"pictures": 16})


@pytest.mark.parametrize("number", [0, 1, 2])
def test_killed_anywhere_it_is_there_whole(tmp_path, number):
    keep(tmp_path / FOLDER, write, FOUND | {"pictures": 8})
    (tmp_path / FOLDER / "unet" / "weight").write_text("old")
    if not (child := os.fork()):
        be_killed_at_rename(tmp_path, number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if number == 2 else -signal.SIGKILL)
    (tmp_path / ".model-0a1b2c3d").mkdir()
    recover(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {FOLDER, ".model-0a1b2c3d"}
    expected = {"pictures": 16, "weight": "new"} if number == 2 else {"pictures": 8, "weight": "old"}
    assert kept(tmp_path) == FOUND | expected


def test_leftovers_of_the_model_in_it_go_too(tmp_path):
    for name in (".best-0a1b2c3d", "..best-0a1b2c3d-4e5f6071", "..best-0a1b2c3d-4e5f6071-old", ".best-of-mine"):
        (tmp_path / name).mkdir()
    recover(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".best-of-mine"]


def test_what_no_run_wrote_is_not_overwritten(tmp_path):
    check_kept(tmp_path)
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(GazeError, match=r"best has no score\.json"):
        check_kept(tmp_path)
    (tmp_path / FOLDER / FILE).write_text("{")
    with pytest.raises(GazeError, match=r"score\.json cannot be read as JSON"):
        check_kept(tmp_path)
    (tmp_path / FOLDER / FILE).write_text("{}")
    check_kept(tmp_path)


# Runs


def test_how_often_a_run_looks_at_itself():
    def looks(**judging):
        return Validation(every=8, prompts=["a"], judges=["shapes"], judging=judging).looks

    assert looks() == {"validation": 8, "judges": 8}
    assert looks(every=24) == {"validation": 8, "judges": 24}
    assert Validation(judges=["shapes"], judging={"every": 24}).looks == {"validation": 0, "judges": 24}
    assert Validation(every=8, judging={"every": 24}).looks == {"validation": 8, "judges": 0}


@pytest.fixture(scope="module")
def options(data, tmp_path_factory):
    """A recipe of three steps in a folder; it is judged after each."""
    cache = tmp_path_factory.mktemp("cache")
    return lambda out, **changes: tiny_recipe(
        out, data, DEFAULT_MODEL / "vae",
        **{"pictures": 24, "checkpoint_every": 24, "validation": JUDGED, "data": {"cache": cache}, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory):
    recipe = options(tmp_path_factory.mktemp("straight") / "run")
    run_here(recipe)
    return recipe


def without_state(out):
    return {name: content for name, content in newest_files(out).items() if name != "manifest.json"}


def test_a_run_scores_keeps_and_trains_the_same_bits(straight, options, tmp_path, capsys):
    off = options(tmp_path / "off", validation={})
    run_here(off)
    assert without_state(off.out) == without_state(straight.out)
    assert not (off.out / FOLDER).exists()
    lines = [row for row in rows(straight.out) if "shapes" in row]
    assert [row["pictures"] for row in lines] == [8, 16, 24]
    assert {name.partition("/")[2] for name in lines[0]} > {"counting", "colour_binding"}
    found = json.loads((straight.out / FOLDER / FILE).read_text())
    assert found["figures"] == {name: value for name, value in lines[-1].items() if name != "pictures"}
    assert (found["pictures"], found["settings"]["num_inference_steps"]) == (24, 1)


def test_what_is_kept_is_what_the_run_would_export_then(straight):
    export(straight)
    model, own = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
                  for folder in (straight.out / "model", straight.out / FOLDER))  # fmt: skip
    own.pop(next(path for path in own if path.name == FILE))
    assert own == model
    assert len(own) > 5


def test_looks_that_signals_cut_short_are_made_up_for_once(straight, options, tmp_path, monkeypatch):
    """The second is the last of the run; killed before its next checkpoint, a run finds a better model than it has."""
    recipe, looks = options(tmp_path / "run"), []

    def judge_and_be_stopped(*arguments):
        looks.append(arguments[-2])
        if looks in ([8, 16], [8, 16, 16, 24]):
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(*arguments)

    monkeypatch.setattr(loop, "judge", judge_and_be_stopped)
    for at in (16, 24):
        with pytest.raises(Stopped) as stopped:
            run_here(recipe)
        assert stopped.value.args == (at,)
        assert [row["pictures"] for row in rows(recipe.out) if "shapes" in row] == [*range(8, at, 8)]
    for _ in range(2):
        run_here(recipe)
        assert looks == [8, 16, 16, 24, 24]
        assert rows(recipe.out) == rows(straight.out)
        assert newest_files(recipe.out) == newest_files(straight.out)
    assert (recipe.out / FOLDER / FILE).read_bytes() == (straight.out / FOLDER / FILE).read_bytes()
    shutil.rmtree(recipe.out / "checkpoints" / "000000000024")
    run_here(recipe)
    assert rows(recipe.out) == rows(straight.out)
    assert (recipe.out / FOLDER / FILE).read_bytes() == (straight.out / FOLDER / FILE).read_bytes()


@pytest.mark.parametrize("name", [FOLDER, "checkpoints", "model"])
def test_a_file_where_a_folder_is_to_be_is_said_before_the_run(options, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    with pytest.raises(GazeError, match=f"{name} is a file, where a run has a folder"):
        run_here(options(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [name]


def test_something_else_in_its_place_is_said_before_the_run(options, tmp_path):
    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    (tmp_path / "run" / FOLDER / "mine.txt").touch()
    with pytest.raises(GazeError, match="it is not overwritten"):
        run_here(options(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [FOLDER]
    assert [path.name for path in (tmp_path / "run" / FOLDER).iterdir()] == ["mine.txt"]
