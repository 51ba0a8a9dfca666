"""Tensors on disk by the hash of what they were made of, in any number of safetensors files, read by mapping them.

A file is named by the sha256 of its content, so one that was damaged or cut short is found and what it held is made
anew. Files appear whole or not at all: a kill loses at most the file that was being written.
"""

from __future__ import annotations

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.files import replacing_file, sha256_of
from diffusion.header import read_header

from .processes import Processes, check_shared

ITEMS, BYTES = 1000, 2**26  # of a file at most, whichever is reached first
KEY = 16  # bytes
KEYS = "keys"  # the tensor of a file that holds those of its rows
TYPES = {"F32": np.float32, "I64": np.int64, "U8": np.uint8}
FORGOTTEN = 3600  # seconds after which a half-written file belongs to no run that still goes on

Item = dict[str, Tensor]  # tensors by name; those of a store have the same names


def key_of(*parts: object) -> bytes:
    """The key of what is made of these parts and nothing else."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=KEY).digest()


def as_keys(keys: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(keys), f"S{KEY}")


class Store:
    """A folder of items, the same for all processes, which must be here together; several runs may share it.

    Takes 24 bytes of memory per item. Damaged files are removed with a warning. Raises GazeError for a folder that
    cannot be made, or that not all processes see.
    """

    def __init__(self, folder: Path, processes: Processes):
        self.folder, self.processes = folder, processes
        if processes.first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise GazeError(
                    f"{folder} cannot be made: {error.strerror}", "another place with data.cache=DIR"
                ) from None
            _remove_leftovers(folder)
        check_shared(folder, processes, "data.cache")
        # One process lists the files for all: others, or later, might see more of them.
        names = processes.gather(sorted(path.name for path in folder.glob("*.safetensors")))[0]
        damaged = [name for name in names[processes.rank :: processes.count] if not _is_sound(folder / name)]
        gone = {name for found in processes.gather(damaged) for name in found}
        if processes.first:
            for name in sorted(gone):
                warnings.warn(f"{folder / name} is damaged; what it held is made again", stacklevel=2)
                (folder / name).unlink(missing_ok=True)
        self._files: list[dict[str, np.ndarray]] = []
        self._keys = self._file_of = self._row_of = as_keys([])
        self._add([name for name in names if name not in gone])

    def __len__(self) -> int:
        return len(self._keys)

    def fill(
        self,
        keys: np.ndarray,
        make: Callable[[Sequence[int]], Iterator[Item]],
        what: str,
        shape_of: Callable[[int], Any],
    ) -> None:
        """Makes the items of `keys` that are not here, each process its share, and waits for all.

        make: numbers of keys -> their items, in the same order. shape_of: what of a number its tensors' shapes depend
        on. what: a name for the progress bar. Raises GazeError, in all processes, when one of them does: among others
        when the disk is full, with path, needed and free bytes.
        """
        first = np.sort(np.unique(keys, return_index=True)[1])
        missing = first[self._find(keys[first]) < 0]
        mine = sorted(missing[self.processes.rank :: self.processes.count].tolist(), key=shape_of)
        written: list[str] = []
        problem: tuple[str, str] | None = None
        try:
            rows = zip(
                (keys[number : number + 1] for number in mine), self._shown(make(mine), len(mine), what), strict=True
            )
            for done, file in _files(rows):
                written.append(self._write(file, len(mine) - done))
        except GazeError as error:
            problem = error.problem, error.hint
        for names, reason in self.processes.gather([written, problem]):
            if reason is not None:
                raise GazeError(*reason)
            self._add(names)

    def read(self, keys: np.ndarray) -> Item:
        """The items of these keys, which must be there, one after the other along a new first dimension."""
        places = self._find(keys)
        if (places < 0).any():
            raise KeyError(f"{self.folder} lacks {int((places < 0).sum())} of {len(keys)} items")
        rows = [(self._files[self._file_of[place]], self._row_of[place]) for place in places]
        names = rows[0][0].keys() - {KEYS}
        return {name: torch.from_numpy(np.stack([file[name][row] for file, row in rows])) for name in names}

    def _find(self, keys: np.ndarray) -> np.ndarray:
        """The place of each key among all, -1 where it is not there."""
        if not len(self._keys):
            return np.full(len(keys), -1)
        places = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[places] == keys, places, -1)

    def _add(self, names: Sequence[str]) -> None:
        self._files += [_mapped(self.folder / name) for name in names]
        each = [file[KEYS].view(f"S{KEY}").ravel() for file in self._files]
        keys = np.concatenate([as_keys([]), *each])
        counts = [len(one) for one in each]
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._file_of = np.repeat(np.arange(len(each), dtype=np.int32), counts)[order]
        self._row_of = np.concatenate([np.arange(count, dtype=np.int32) for count in [0, *counts]])[order]

    def _shown(self, items: Iterator[Item], total: int, what: str) -> Iterator[Item]:
        """The same items, with a progress bar where a person looks on."""
        console = Console(stderr=True)
        hidden = not (self.processes.first and total and console.is_terminal)
        yield from track(items, f"encoding {what}", total, console=console, disable=hidden)

    def _write(self, rows: Sequence[tuple[np.ndarray, Item]], left: int) -> str:
        """Writes one file and returns its name. left: items of this process after it."""
        tensors = {name: torch.stack([item[name] for _, item in rows]) for name in rows[0][1]}
        keys = np.concatenate([key for key, _ in rows]).view(np.uint8).reshape(-1, KEY)
        content = save({**tensors, KEYS: torch.from_numpy(keys.copy())})
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        needed = len(content) * (left + len(rows)) // len(rows) * self.processes.count
        free = shutil.disk_usage(self.folder).free
        try:
            if free < needed:
                raise OSError("no space left on device")
            with replacing_file(path) as aside:
                aside.write_bytes(content)
        except OSError as error:
            raise GazeError(
                f"{self.folder} cannot be written: {error}; what is left takes {needed} bytes, {free} are free",
                "free some space, or another place with data.cache=DIR; the same command goes on from what is there",
            ) from None
        return path.name


def _files(rows: Iterable[tuple[np.ndarray, Item]]) -> Iterator[tuple[int, list[tuple[np.ndarray, Item]]]]:
    """Rows in groups that fit a file, each with the number of rows so far. A file's rows have the same shapes."""
    file: list[tuple[np.ndarray, Item]] = []
    most, shapes = ITEMS, None
    for done, (key, item) in enumerate(rows):
        new = [value.shape for value in item.values()]
        if file and (new != shapes or len(file) == most):
            yield done, file
            file = []
        file.append((key, item))
        shapes = new
        most = min(ITEMS, 1 + BYTES // sum(value.nbytes for value in item.values()))
    if file:
        yield done + 1, file


def _is_sound(path: Path) -> bool:
    """Whether the file has the content that its name says."""
    return sha256_of(path) == path.stem


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, without reading it. Their memory is the system's, which takes it back when it likes."""
    # Unlike Python's own, this mapping keeps no descriptor, of which a process may have some thousand.
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    entries = read_header(path).tensors
    return {
        name: np.frombuffer(content, TYPES[entry.dtype], prod(entry.shape), entry.begin).reshape(entry.shape)
        for name, entry in entries.items()
    }


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".*"):
        if time.time() - path.stat().st_mtime > FORGOTTEN:
            path.unlink(missing_ok=True)
