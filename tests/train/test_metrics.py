"""metrics.jsonl and what is printed beside it."""

import json

from train.metrics import Metrics


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
