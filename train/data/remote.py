"""Files of a URL through fsspec, kept in a folder that many processes and runs share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffusion.errors import GazeError
from diffusion.files import replacing_file

from .source import need

SPARE = 2**30  # bytes that stay free on the disk
PAUSES = (1.0, 5.0, 25.0)  # seconds before each further attempt
PIECE = 2**20  # bytes
GONE = (404, 410)  # of HTTP: asking again would not help

T = TypeVar("T")


def is_url(place: str) -> bool:
    return "://" in place


def fetch_text(url: str) -> str:
    """A small file. Raises GazeError when it cannot be had."""
    return _insist(url, lambda: _read(url).decode("utf-8"))


def fetch(url: str, file: Path, size: int, sha256: str) -> Path:
    """`file`, which has the URL's content: it is there, or is downloaded, by one process where several want it.

    The folder's oldest files make room where the disk has less than a gibibyte left. Raises GazeError when the URL
    does not answer or its content is not of that size and hash; then no file is left.
    """
    try:
        os.utime(file)  # the oldest are those that nobody asked for
        return file
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            _make_room(file.parent, size)
            _insist(url, lambda: _download(url, file, size, sha256))
    return file


def _read(url: str) -> bytes:
    with _open(url) as file:
        return file.read()


def _open(url: str) -> Any:
    try:
        return need("fsspec", "shards", f"{url}").open(url, "rb").open()
    except (ImportError, ValueError) as error:  # fsspec knows the protocol but not its package, or not the protocol
        raise GazeError(f"{url} cannot be opened: {error}", "install the package that the message names") from None


def _insist(url: str, action: Callable[[], T]) -> T:
    """The action's result, tried again where a network may have failed."""
    for pause in (*PAUSES, None):
        try:
            return action()
        except GazeError:
            raise
        except Exception as error:  # each protocol has errors of its own
            reason = _reason(error)
            if pause is None or isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) in GONE:
                raise GazeError(
                    f"{url} cannot be read: {type(reason).__name__}: {reason}", "check the address and the network"
                ) from None
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _reason(error: Exception) -> BaseException:
    """fsspec calls whatever happened over HTTP a file that is not there, also a server that does not answer."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _download(url: str, file: Path, size: int, sha256: str) -> None:
    total, count = hashlib.sha256(), 0
    with replacing_file(file) as aside, _open(url) as source, aside.open("wb") as target:
        while count <= size and (piece := source.read(PIECE)):
            target.write(piece)
            total.update(piece)
            count += len(piece)
        if count != size or total.hexdigest() != sha256:
            raise GazeError(f"{url} is not what its manifest says", "upload the shards and their manifest again")


def _make_room(folder: Path, size: int) -> None:
    files = sorted((path for path in folder.glob("[!.]*")), key=lambda path: path.stat().st_mtime)
    for oldest in files:
        if shutil.disk_usage(folder).free >= size + SPARE:
            break
        oldest.unlink(missing_ok=True)
