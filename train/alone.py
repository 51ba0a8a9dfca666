"""One run at a time writes into a folder: two would mix their logs and remove each other's files."""

from __future__ import annotations

import fcntl
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
    with (out / MARK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            _taken(out, (out / MARK).read_text().strip())
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                (out / MARK).unlink()


def _taken(out: Path, who: str) -> None:
    says = f"another run writes into {out}: {who or 'it is about to begin'}"
    if who and not who.endswith(f" on {platform.node()}"):
        warnings.warn(f"{says}; if it is gone, all is well; if not, end one of the two", stacklevel=3)
        return
    raise GazeError(says, "wait for its end, or end it; or another out=DIR")
