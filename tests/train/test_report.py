"""The report of a run: what is on it, that it asks for nothing else, and that nothing in a run's files gets to act."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
import yaml
from PIL import Image

from diffusion.errors import GazeError
from tests.train.tiny import tiny_recipe
from train import __main__ as command
from train.charts import MOST, chart, short, smooth, thin
from train.environment import describe
from train.report import MOST_GRIDS, write_report

HOSTILE = "</pre><script>alert(1)</script><img src=http://x.example onerror=alert(2)> & \"'"
MARKUP = "<script>alert(1)<b onload=x> & \"'"  # no slash: that would make two names of it
VOID = {"meta", "img", "input", "br", "link"}


class Page(HTMLParser):
    """The elements with their attributes and the text of each kind; fails where an element is not closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag, kind=None):
        return [found for name, found in self.elements if name == tag and (kind is None or found.get("class") == kind)]


def make_run(folder, rows=40, grids=3, **changes):
    recipe = tiny_recipe(folder, folder, validation={"every": 8, "prompts": ["a cat", HOSTILE]}, **changes)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    lines = [
        {"pictures": 2 * n, "loss": 1 / n, "gradient_norm": 2.0, "pictures_per_second": 8.0, "time/data": 0.25,
         "time/forward": 0.75, "seconds/validation": 3.0, "peak_memory_gb": 1.5, MARKUP: 1.0}
        for n in range(1, rows + 1)
    ]  # fmt: skip
    lines += [
        {"pictures": 2 * rows, "held_out_loss": 0.5, "held_out_loss/sigma_0.1": 0.25, "held_out_loss/sigma_3": 0.75}
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    starts = [{"time": "2026-01-01", "pictures": n, "processes": 2, "devices": [HOSTILE]} for n in (0, 16)]
    (folder / "environment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    (folder / "samples").mkdir()
    for number in range(grids):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "samples" / f"{8 * number:012d}.png")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path)


def test_the_page_has_all_parts(run):
    page = Page(write_report(run).read_text())
    drawn = [svg["aria-label"] for svg in page.all("svg")]
    assert drawn[:4] == ["Loss", "Held-out loss", "Gradient norm", "Pictures per second"]
    assert {"Time of a step", "Peak memory", MARKUP} <= set(drawn)
    assert [line["data-name"] for line in page.all("polyline", "curve")][1:4] == ["mean", "sigma 0.1", "sigma 3"]
    assert sum("hidden" in figure for figure in page.all("figure")) == 2  # of three grids the last is shown
    assert page.all("input") == [{"type": "range", "min": "0", "max": "2", "value": "2",
                                  "aria-label": "samples over time"}]  # fmt: skip
    assert page.texts["li"] == ["a cat", HOSTILE]
    assert yaml.safe_load("".join(page.texts["pre"])) == yaml.safe_load((run / "recipe.yaml").read_text())
    assert page.texts["td"] == ["2026-01-01", "0", "2", HOSTILE, "2026-01-01", "16", "2", HOSTILE]
    assert len(page.all("line", "mark")) == len(drawn)  # one resume, in each chart
    assert "80 of 80 pictures (100%)" in "".join(page.texts["div"])


def test_the_page_asks_for_nothing_and_nothing_of_the_run_acts_in_it(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert len(page.all("script")) == 1
    assert {tag for tag, _ in page.elements}.isdisjoint({"link", "iframe", "object", "base", "form"})
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("href", "action", "srcset") for name in attributes), tag
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert {tag for tag, attributes in page.elements if "src" in attributes} == {"img"}
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy
    for part in (*page.texts["script"], *page.texts["style"]):
        assert not re.search(r"https?:|url\(|@import|fetch|innerHTML", part)


def test_while_the_run_goes_on(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"pictures": 81, "loss": NaN}\n[3]\n{"pictures": 82, "lo')
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("pictures: 80\n", "pictures: 29081\n"))
    text = write_report(run).read_text()
    assert "81 of 29,081 pictures (0%), about 1.0 hours left" in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text.lower())


def test_scores_have_a_chart_by_skill_and_the_best_a_line(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"pictures": 80, "shapes": 0.5, "shapes/counting": 0.25, "shapes/two_objects": 0.75}\n')
    (run / "best").mkdir()
    found = {"by": HOSTILE, "score": 0.75, "low": 0.5, "high": 0.9, "pictures": 12_000}
    (run / "best" / "score.json").write_text(json.dumps(found))
    page = Page(write_report(run).read_text())
    assert "Shapes" in [svg["aria-label"] for svg in page.all("svg")]
    assert {"counting", "two objects"} <= {line["data-name"] for line in page.all("polyline", "curve")}
    said = f"Best so far, in best/: {HOSTILE} 75.0% (95 % interval 50.0% to 90.0%) after 12,000 pictures"
    assert said in "".join(page.texts["p"])
    assert page.texts["b"][0] == "50.0%"
    (run / "best" / "score.json").write_text('{"score": "high"}')
    assert "Best so far" not in write_report(run).read_text()


def test_the_plan_stands_beside_what_was_measured(run):
    assert "planned" not in write_report(run).read_text()
    (run / "plan.json").write_text(json.dumps({"pictures_per_second": 10.0, "memory": {"peak": 1.5e9}, "mfu": 0.3}))
    cells = Page(write_report(run).read_text()).texts["td"]
    assert cells[:8] == ["Pictures per second", "10", "8", "-20%", "Peak memory", "1.5", "1.5", "+0%"]


def test_a_plan_is_compared_with_what_it_is_a_plan_of(run):
    """Not with another number of devices; and on a CPU the memory that was measured is that of all libraries too."""
    known = {"pictures_per_second": 10.0, "memory": {"peak": 1.5e9}}
    (run / "plan.json").write_text(json.dumps({**known, "count": 8}))
    assert "planned" not in write_report(run).read_text()
    (run / "plan.json").write_text(json.dumps({**known, "count": 2}))
    (run / "environment.jsonl").write_text(
        json.dumps({"pictures": 0, "processes": 2, "devices": [describe(torch.device("cpu"))]}) + "\n"
    )
    cells = Page(write_report(run).read_text()).texts["td"]
    assert cells[:4] == ["Pictures per second", "10", "8", "-20%"]
    assert "Peak memory" not in cells


def test_a_run_of_many_grids_shows_some_of_all_of_it(tmp_path):
    page = Page(write_report(make_run(tmp_path, grids=150)).read_text())
    assert len(page.all("img")) == MOST_GRIDS
    assert page.all("img")[0]["alt"] == "samples after 0 pictures"
    assert page.all("img")[-1]["alt"] == "samples after 1,192 pictures"


def test_files_that_are_missing_or_broken_leave_the_rest(run):
    for name in ("environment.jsonl", "recipe.yaml", "plan.json"):
        (run / name).write_bytes(b"\xff{: ]" if name != "recipe.yaml" else b"pictures: many\nvalidation: [1]")
    shutil.rmtree(run / "samples")
    page = Page(write_report(run).read_text())
    assert len(page.all("svg")) > 5
    assert not page.all("img")


@pytest.mark.parametrize("content", [None, "", "no json\n"])
def test_a_folder_without_metrics_is_an_error(tmp_path, monkeypatch, capsys, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(GazeError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)
    monkeypatch.setattr("sys.argv", ["train", "report", str(tmp_path)])
    monkeypatch.setattr("warnings.showwarning", None)
    assert command.main() == 1
    assert capsys.readouterr().err.startswith(f"error: '{tmp_path}' holds no metrics")
    assert not (tmp_path / "report.html").exists()


def test_the_command_prints_where_the_page_is(run, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train", "report", str(run)])
    monkeypatch.setattr("warnings.showwarning", None)
    assert command.main() == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"


# Charts


def test_a_curve_goes_where_its_values_are():
    figure = ElementTree.fromstring(chart("t", "", {"a": [(0, 1.0), (5, 3.0), (10, 2.0)]}))
    svg = figure.find("svg")
    low, high = map(float, svg.get("data-y").split())
    places = [tuple(map(float, pair.split(","))) for pair in svg.find("polyline").get("points").split()]
    width, height = map(float, svg.get("data-size").split())
    assert [x / width for x, _ in places] == [0, 0.5, 1]
    assert [high - (high - low) * y / height for _, y in places] == pytest.approx([1, 3, 2], abs=0.01)
    labels = [text.text for text in svg.findall("text")]
    assert {"1", "1.5", "2", "2.5", "3", "0", "10"} <= set(labels)


def test_values_that_spread_far_are_on_a_logarithmic_axis():
    svg = ElementTree.fromstring(chart("t", "", {"a": [(0, 1e-3), (1, 1.0), (2, 1e3)]})).find("svg")
    heights = [float(pair.split(",")[1]) for pair in svg.find("polyline").get("points").split()]
    assert svg.get("data-log") == "1"
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.02)
    assert {"0.001", "1", "1000"} <= {text.text for text in svg.findall("text")} | {"1000"}


@pytest.mark.parametrize("points", [[(8, 0.5)], [(8, 0.0), (8, 0.0)], [(0, 1e-30), (1, -1e30)], [(1, 5), (2, 5)]])
def test_curves_without_extent_and_extreme_ones_are_drawn(points):
    figure = ElementTree.fromstring(chart("t", "", {"a": points}))
    assert "nan" not in ElementTree.tostring(figure, encoding="unicode")


def test_a_noisy_curve_is_drawn_with_its_running_mean():
    points = [(n, 1.0 + n % 2) for n in range(100)]
    lines = ElementTree.fromstring(chart("t", "", {"a": points}, noisy=True)).findall("svg/polyline")
    assert [line.get("class") for line in lines] == ["raw", "curve"]
    (line,) = ElementTree.fromstring(chart("t", "", {"a": points})).findall("svg/polyline")
    assert line.get("points") == lines[0].get("points") != lines[1].get("points")


def test_thinning_keeps_every_spike_and_smoothing_the_mean():
    points = [(n, float(n % 7)) for n in range(20_000)]
    points[12_345] = (12_345, 900.0)
    kept = thin(points)
    assert len(kept) <= 1.6 * MOST
    assert (12_345, 900.0) in kept
    assert kept[-1] == points[-1]
    assert list(kept) == sorted(kept)
    assert smooth([(n, 2.0) for n in range(90)])[-1] == (89, 2.0)
    assert smooth([(n, float(n)) for n in range(90)])[-1] == (89, 88.0)  # of the last three


def test_numbers_in_a_few_letters():
    assert [short(value) for value in (0, 0.25, 12_000, 3_500_000, 2e-5, -1500)] == [
        "0", "0.25", "12k", "3.5M", "2e-05", "-1.5k",
    ]  # fmt: skip


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_page_and_its_script_runs(run, tmp_path):
    page = write_report(run)
    probe = """<script>{
      const slider = document.querySelector("#samples input");
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const svg = document.querySelector("svg"), area = svg.getBoundingClientRect();
      svg.dispatchEvent(new PointerEvent("pointermove", { clientX: area.right, clientY: area.top }));
      document.title = [...document.querySelectorAll("#samples figure")].map(f => +f.hidden).join("") + " "
        + document.querySelector(".chart output").textContent;
    }</script></body>"""
    page.write_text(page.read_text().replace("</body>", probe))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(["chromium", *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    title = re.search("<title>(.*)</title>", done.stdout)[1]
    assert title == "011 80 pictures: 0.025"
