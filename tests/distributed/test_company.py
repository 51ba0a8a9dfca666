"""What the first process makes of the others' signs of life."""

import pytest

from train import company
from train.company import SILENCE, SUSPECT, _Listener


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that the listener sees."""
    now = [100.0]
    monkeypatch.setattr(company.time, "monotonic", lambda: now[0])
    return now


def state(beat: int, failed: str | None = None, suspects: bool = False) -> dict:
    return {"beat": beat, "pictures": 48, "step": 6, "failed": failed, "suspects": suspects}


def test_all_is_well_while_every_beat_is_new(clock):
    listener = _Listener(3)
    for beat in range(1, 100):
        clock[0] += 0.9 * SILENCE
        assert listener.verdict([state(beat)] * 3) is None


def test_a_process_that_failed_is_named_with_its_step_and_error(clock):
    said = _Listener(2).verdict([state(1), state(1, failed="GazeError: no such file")])
    assert said == "process 1 failed at picture 48, step 6 (GazeError: no such file)"


@pytest.mark.parametrize("suspects, patience", [(False, SILENCE), (True, SUSPECT)])
def test_a_silent_process_is_named_sooner_where_an_operation_has_failed(clock, suspects, patience):
    listener = _Listener(2)
    assert listener.verdict([state(1), state(1)]) is None
    clock[0] += patience - 0.1
    assert listener.verdict([state(2, suspects=suspects), state(1)]) is None
    clock[0] += 0.2
    said = listener.verdict([state(3, suspects=suspects), state(1)])
    assert said.startswith("process 1 was killed or stopped at picture 48, step 6: no sign of life")
