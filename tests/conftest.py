"""What tests of the command line share."""

import sys

import pytest

from pipelines.__main__ import main


@pytest.fixture
def gaze(monkeypatch, capsys, tmp_path):
    """Runs a command line in a folder of its own; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gaze", *map(str, arguments)])
        monkeypatch.setenv("GAZE_DEBUG", "")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
