"""One run at a time writes into a folder: two would mix their logs and remove each other's files."""

from __future__ import annotations

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from diffusion.errors import GazeError
from pipelines.files import check_writable

from .processes import Processes

MARK = ".run"  # is there and locked while a run goes on, and says who; the system unlocks it when that process ends


@contextmanager
def alone(out: Path, processes: Processes) -> Iterator[None]:
    """In its block the folder, which is made if needed, is this run's. Only the first process does anything.

    Raises GazeError where it cannot be written, or where another run of this machine writes into it. One of another
    machine is warned of: there a lock may outlive a machine that is lost.
    """
    if not processes.first:
        yield
        return
    try:
        check_writable(out)
    except GazeError as error:
        raise GazeError(error.problem, "another place with out=DIR") from None
    with _mark(out) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (out / MARK).unlink()


def _mark(out: Path) -> TextIO:
    """The mark, opened, and locked where the file system can do that."""
    path = out / MARK
    try:
        file = path.open("a+")
    except OSError as error:
        raise GazeError(f"{path} cannot be written: {error.strerror}", "another place with out=DIR") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        _taken(out, file)
    except OSError:  # a file system without locks
        pass
    if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
        return file
    file.close()  # the run before has removed it meanwhile
    return _mark(out)


def _taken(out: Path, file: TextIO) -> None:
    file.seek(0)
    who = file.read().strip()
    says = f"another run writes into {out}: {who or 'it is about to begin'}"
    if who and not who.endswith(f" on {platform.node()}"):
        warnings.warn(f"{says}; if it is gone, all is well; if not, end one of the two", stacklevel=4)
        return
    file.close()
    raise GazeError(says, "wait for its end, or end it; or another out=DIR")
