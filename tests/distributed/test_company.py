"""What the first process makes of the others' signs of life."""

import threading
import time
from typing import NoReturn

import pytest

from train import company
from train.company import EXIT_CODE, SILENCE, SUSPECT, Company, _Listener
from train.processes import Processes


@pytest.fixture
def clock(monkeypatch):
    """Sets the time that the listener sees."""
    now = [100.0]
    monkeypatch.setattr(company.time, "monotonic", lambda: now[0])
    return now


def state(beat: int, failed: str | None = None, suspects: bool = False) -> dict:
    return {"beat": beat, "pictures": 48, "step": 6, "failed": failed, "code": 74, "suspects": suspects}


def test_all_is_well_while_every_beat_is_new(clock):
    listener = _Listener(3)
    for beat in range(1, 100):
        clock[0] += 0.9 * SILENCE
        assert listener.verdict([state(beat)] * 3) is None


def test_a_process_that_failed_is_named_with_its_step_and_error(clock):
    said = _Listener(2).verdict([state(1), state(1, failed="GazeError: no such file")])
    assert said == ("process 1 failed at picture 48, step 6 (GazeError: no such file)", 74)


@pytest.mark.parametrize("suspects, patience", [(False, SILENCE), (True, SUSPECT)])
def test_a_silent_process_is_named_sooner_where_an_operation_has_failed(clock, suspects, patience):
    listener = _Listener(2)
    assert listener.verdict([state(1), state(1)]) is None
    clock[0] += patience - 0.1
    assert listener.verdict([state(2, suspects=suspects), state(1)]) is None
    clock[0] += 0.2
    said, code = listener.verdict([state(3, suspects=suspects), state(1)])
    assert said.startswith("process 1 was killed or stopped at picture 48, step 6: no sign of life")
    assert code == EXIT_CODE


def test_who_waits_for_ever_for_others_to_come_ends_and_says_so(monkeypatch, capsys):
    left = threading.Event()
    codes = []
    monkeypatch.setattr(company.os, "_exit", lambda code: codes.append(code) or left.set())
    with company.meeting():
        (patience,) = (thread for thread in threading.enumerate() if isinstance(thread, threading.Timer))
    assert patience.finished.is_set(), "all came"
    assert codes == []
    monkeypatch.setattr(company, "MEETING", 0.0)
    with company.meeting():
        assert left.wait(30)
    assert codes == [EXIT_CODE]
    assert capsys.readouterr().err.startswith("error: process 0 has waited for 0 minutes and not met all others")


class Left(BaseException):
    """In the place of os._exit."""


@pytest.fixture
def member(monkeypatch):
    """Of two, the second, which has no patience."""

    def leave(code: int) -> NoReturn:
        raise Left(code)

    monkeypatch.setattr(company.os, "_exit", leave)
    for name in ("BEAT", "GRACE", "SILENCE"):
        monkeypatch.setattr(company, name, 0.01)
    member = Company(Processes(1, 2))
    member.heard = time.monotonic()
    member.at(48, 6)
    return member


def test_where_the_first_process_is_gone_the_others_say_so_and_how_far_they_were(member, capsys):
    class Gone:
        def set(self, *_):
            raise RuntimeError("Broken pipe")

    member.store = Gone()
    with pytest.raises(Left) as left:
        member._watch()
    assert left.value.args == (EXIT_CODE,)
    assert capsys.readouterr().err.startswith("error: process 0 is gone, at picture 48, step 6 or later; process 1")


def test_where_the_first_process_is_stopped_nobody_waits_for_its_answer(member, capsys):
    answered = threading.Event()

    class Stopped:
        def set(self, *_):
            answered.wait(30)

        def check(self, keys):
            return False

    member.store = Stopped()
    member.thread.start()
    with pytest.raises(Left) as left:
        member._guard()
    assert left.value.args == (EXIT_CODE,)
    said = capsys.readouterr().err
    assert said.startswith("error: process 0 was killed or stopped, at picture 48, step 6 or later: no answer for")
    member.over.set()
    answered.set()
    member.thread.join()
    member._guard()  # has nothing left to guard
