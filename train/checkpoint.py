"""Saving so that a kill at any instant leaves a sound checkpoint, and finding it again; many processes, one outcome.

Each process writes its share aside and flushes it; the manifest comes last, then one rename, then everything is read
again, and only then are old ones removed. What fails on one process has failed on all: none waits for another, and
nothing half written bears a checkpoint's name. The files themselves: checkpoint_files.py.
"""

from __future__ import annotations

import shutil
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import GazeError

from . import checkpoint_files as files
from .checkpoint_files import ALONE, Tensors
from .processes import Processes

SPARE = 1.2  # free space asked for before writing, in sizes of the checkpoint
ATTEMPTS = 2  # at one save
MOST_FAILED = 3  # saves in a row before the run ends


class NotSaved(GazeError):
    """A checkpoint could not be written; those before it are untouched."""

    exit_code = 74


class Checkpoints:
    """The checkpoints in a folder that all processes see. Every process calls every method, in the same order.

    keep: how many sound ones stay at least, the newest.
    """

    def __init__(self, folder: Path, keep: int, processes: Processes = ALONE):
        self.folder, self.keep, self.processes = folder, keep, processes
        self.broken: set[Path] = set()
        self.origin: Path | None = None  # gone back to, until the first save after it
        self.failed = 0  # saves in a row

    def find(self, resume: str) -> Path | None:
        """The checkpoint to go on from, verified, or None to begin anew. resume: as in the recipe; given a path, the
        newest checkpoint that the run has written since it began from there, or the one of that path.

        Raises GazeError when `resume` forbids what is there or names what cannot be used, and when there are some but
        none is whole.
        """
        if resume not in ("auto", "never"):
            path = Path(resume)
            if self.processes.gather(files.began_from(self.folder, path))[0] and (later := self.newest(after=path)):
                return later
            problem = files.verify(path, self.processes)
            if problem is not None:
                raise GazeError(
                    f"resume={resume}: it is no checkpoint to go on from: {problem}",
                    "a folder such as RUN/checkpoints/000000020000, or resume=auto",
                )
            self.origin = path
            return path
        newest = self.newest()
        if newest is not None and resume == "never":
            raise GazeError(f"{self.folder} holds checkpoints and resume is never", "another out=DIR, or resume=auto")
        return newest

    def newest(self, after: Path | None = None) -> Path | None:
        """The newest checkpoint (newer than `after`) that verifies, or None without any. Broken ones are named in a
        warning, passed over.

        Raises GazeError when there are some but none verifies: to begin anew is for the user to decide; and for one of
        a later version of Gaze, which a save of this one would replace.
        """
        names = self.processes.gather([path.name for path in files.folders(self.folder, after)])[0]
        problems = []
        for path in (self.folder / name for name in names):
            problem = files.verify(path, self.processes)
            if problem is None:
                return path
            if self.processes.gather(files.is_later(path))[0]:
                raise GazeError(
                    f"checkpoint {path} cannot be used: {problem}",
                    "the version that wrote it; or here another out=DIR",
                )
            self.broken.add(path)
            self._warn(f"checkpoint {path} is passed over: {problem}")
            problems.append(problem)
        if problems:
            raise GazeError(
                f"none of the {len(names)} checkpoints in {self.folder} can be used; the newest: {problems[0]}",
                "another out=DIR; to begin anew here, remove them",
            )
        return None

    def save(self, pictures: int, tensors: Tensors, state: Mapping[str, Any], last: bool = False) -> Path | None:
        """Writes the checkpoint of `pictures` and removes those before the newest `keep`. None: it failed, with a
        warning, and the run may go on. The first after going back sets those aside that were newer.

        tensors: the same names on all processes; a DTensor is gathered, any other tensor is the same on all.
        state: JSON values; must hold what `load` compares.
        last: no later save will make up for it. Raises NotSaved for a last one, and at the third failure in a row.
        """
        final = self.folder / files.name_of(pictures)
        size = files.total_bytes(tensors)
        own = files.own_share(tensors, self.processes)
        for _ in range(ATTEMPTS):
            try:
                self._write(final, own, size, state)
            except OSError as error:
                problem = error
            else:
                self.failed = 0
                self.broken.discard(final)
                if self.processes.first:
                    self._prune(pictures)
                return final
        self.failed += 1
        free = min(self.processes.gather(_free(self.folder)))
        text = f"checkpoint {final} cannot be written: {problem} (needed: {SPARE * size:.0f} bytes, free: {free} bytes)"
        if last or self.failed == MOST_FAILED:
            hint = "free some space or repair the disk, then the same command; it goes on from the checkpoint before"
            raise NotSaved(text, hint)
        self._warn(f"{text}; the run goes on and tries again at the next one ({self.failed} of {MOST_FAILED})")
        return None

    def amend(self, pictures: int, changes: Mapping[str, Any]) -> None:
        """Changes values of the state of this run's own checkpoint of `pictures`, in one rename; one elsewhere that the
        run has gone back to stays as it is."""
        if self.origin is None and self.processes.first:
            files.amend(self.folder / files.name_of(pictures), changes)

    def remove_leftovers(self, pictures: int) -> None:
        """Removes what a killed run left half written, and what it had no time to remove. Only for the run that writes
        here, before its first save. pictures: of the checkpoint that it goes on from, 0 for none."""
        if self.processes.first:
            self._prune(pictures)
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def _write(self, final: Path, own: Tensors, size: int, state: Mapping[str, Any]) -> None:
        """Raises OSError on all processes, with the same words, when one of them fails; nothing is left then."""
        if self.origin is not None:
            origin = self.origin
            self._together(lambda: files.begin_from(self.folder, origin), self.processes.first)
            self.origin = None
        aside = self.folder / self.processes.gather(f".tmp-{final.name}-{uuid.uuid4().hex[:8]}")[0]
        try:
            self._together(lambda: aside.mkdir(parents=True), self.processes.first)
            self._together(lambda: _check_free(aside, size))
            parts = self._together(lambda: files.write_share(aside, own, self.processes.rank))
            manifest = {
                "format": files.FORMAT,
                "pictures": int(final.name),
                "processes": self.processes.count,
                "state": state,
                "files": {name: file for part in parts for name, file in part.items()},
            }
            self._together(lambda: files.publish(aside, final, manifest), self.processes.first)
            problem = files.verify(final, self.processes)
            if problem is not None:
                self._together(lambda: files.discard(final), self.processes.first)
                raise OSError(f"read again after writing: {problem}")
        finally:
            if self.processes.first:
                shutil.rmtree(aside, ignore_errors=True)

    def _together(self, action: Callable[[], Any], taking_part: bool = True) -> list[Any]:
        """What `action` returns on each process that takes part. Raises OSError on all when it fails on one."""
        result, problem = None, None
        try:
            result = action() if taking_part else None
        except (OSError, MemoryError) as error:
            problem = f"{type(error).__name__}: {error}"
        outcomes = self.processes.gather([result, problem])
        for rank, (_, problem) in enumerate(outcomes):
            if problem is not None:
                raise OSError(f"in process {rank}, {problem}")
        return [result for result, _ in outcomes]

    def _prune(self, pictures: int) -> None:
        """Newer ones than `pictures` are those that this run passed over: they push out nothing."""
        paths = [path for path in files.folders(self.folder) if int(path.name) <= pictures]
        sound = [path for path in paths if path not in self.broken]
        try:
            for old in set(paths) - set(sound[: self.keep]):
                files.discard(old)
        except OSError as error:
            self._warn(f"an old checkpoint cannot be removed: {error}")

    def _warn(self, text: str) -> None:
        if self.processes.first:
            warnings.warn(text, stacklevel=3)


def _check_free(folder: Path, size: int) -> None:
    if _free(folder) < SPARE * size:
        raise OSError("no space left on device")


def _free(folder: Path) -> int:
    """Bytes left where the folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
