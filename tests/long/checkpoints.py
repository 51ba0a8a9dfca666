"""What checkpoints outlive, counted: R2, R6 and R7 at full length. Prints one line for each.

    python -m tests.long.checkpoints [FOLDER] [--flips 1000] [--places 100]

R2: real processes (gloo) of which one ends at each of its writes, flushes, renames and removals in turn, half a write
done. R6: a file system of a few hundred pages (tmpfs, which only root may mount; elsewhere a limit on file sizes) that
is full at --places places of a save. R7: single bits flipped, and each file cut, emptied and deleted.
"""

import argparse
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from tests.train.test_checkpoint import STATE, Dying, flip, newest, write
from tests.train.threads import together
from tests.train.tiny import PROCESSES, free_port
from train import checkpoint
from train.checkpoint import Checkpoints, NotSaved
from train.checkpoint_files import verify
from train.processes import Processes

PAGE = 4096
LIMIT = 15  # seconds that the others may take to end


class Exiting(Dying):
    def die(self) -> NoReturn:
        os._exit(9)


def save_and_die(rank: int, count: int, port: int, folder: Path, victim: int, place: int) -> None:
    dying = Exiting(pytest.MonkeyPatch(), "MainThread")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    processes = Processes(rank, count)
    write(folder, 8, 16, keep=2, processes=processes)
    dying.calls, dying.left = 0, place if rank == victim else dying.left
    try:
        write(folder, 24, keep=2, processes=processes)
    except RuntimeError:  # the other one is gone
        os._exit(1)


def sound(folder: Path) -> int:
    """How many checkpoints verify; -1 when a folder that bears a checkpoint's name does not, or a start would warn."""
    paths = list(folder.glob("[0-9]*"))
    good = sum(verify(path) is None for path in paths)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return good if good == len(paths) and newest(folder) is not None else -1


def deaths(folder: Path) -> str:
    places, failures, slowest = 0, 0, 0.0
    for count, victim in ((1, 0), (2, 0), (2, 1)):
        codes, place = [9], 0
        while 9 in codes:
            to, port = folder / f"{count}-{victim}-{place}", free_port()
            processes = [PROCESSES.Process(target=save_and_die, args=(rank, count, port, to, victim, place))
                         for rank in range(count)]  # fmt: skip
            for process in processes:
                process.start()
            processes[victim].join()
            begin = time.monotonic()
            for process in processes:
                process.join(max(begin + LIMIT - time.monotonic(), 0))
            codes = [process.exitcode for process in processes]
            slowest = max(slowest, time.monotonic() - begin)
            failures += None in codes or sound(to) < 2
            place += 1
        places += place - 1
    return (f"R2  ended at {places} writes, flushes, renames, removals (1 process, either of 2): {failures} bad; "
            f"the other process ended within {slowest:.1f} s")  # fmt: skip


@contextmanager
def narrow_place(folder: Path, pages: int) -> Iterator[tuple[Path, Callable[[int], None]]]:
    """A folder and a function that leaves so many bytes there (of each file, where no tmpfs can be mounted)."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        yield folder, lambda left: resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
        return

    def leave(left: int) -> None:
        (folder / "ballast").unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
        (folder / "ballast").write_bytes(bytes(max(free - left // PAGE * PAGE, 0)))

    try:
        yield folder, leave
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disks(folder: Path, places: int) -> str:
    """Tensors of one page each, so that the disk is full at another one each time."""
    tensors = {"model": {f"{number:03}": torch.full((PAGE // 4,), float(number)) for number in range(places)}}
    checkpoint.SPARE = 0  # the disk itself shall say no
    failures, warned, refused = 0, 0, 0
    with narrow_place(folder / "full", 4 * places + 100) as (place, leave):
        checkpoints = Checkpoints(place / "checkpoints", 2)
        for count in (8, 16):
            checkpoints.save(count, tensors, STATE)
        for number in range(places):
            leave(number * PAGE)
            checkpoints = Checkpoints(place / "checkpoints", 2)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                saved = checkpoints.save(24, tensors, STATE)
            words = ("cannot be written", str(place), "needed: ", "free: ")
            warned += saved is None and len(told) == 1 and all(word in str(told[0].message) for word in words)
            try:
                checkpoints.save(24, tensors, STATE, last=True)
            except NotSaved as error:
                refused += error.exit_code == 74 and all(word in error.problem for word in words)
            failures += sound(place / "checkpoints") != 2 or len(list((place / "checkpoints").iterdir())) != 2
        leave(4 * places * PAGE)
        failures += Checkpoints(place / "checkpoints", 2).save(24, tensors, STATE) is None
    return (f"R6  disk full at {places} places of a save: {failures} failures; {warned} warnings and the run goes on, "
            f"{refused} ends with 74, naming path, needed and free bytes")  # fmt: skip


def damages(folder: Path, flips: int) -> str:
    first, second = together(2, lambda rank: write(folder, 8, 16, processes=rank))[0]
    chance = random.Random(0)
    files = sorted(second.iterdir())
    sizes = [file.stat().st_size for file in files]
    missed = 0
    for file in chance.choices(files, sizes, k=flips):
        position, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, position, bit)
        missed += not passed_over(folder, first, second)
        flip(file, position, bit)
    harms = 0
    for file in files:
        content = file.read_bytes()
        cuts = [content[: chance.randrange(len(content))] for _ in range(10)]
        for damaged in [b"", *cuts, None]:
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            missed += not passed_over(folder, first, second)
            file.write_bytes(content)
            harms += 1
    assert newest(folder) == second
    return (
        f"R7  {flips} single bits flipped, {harms} files cut, emptied or deleted ({len(files)} files): {missed} missed"
    )


def passed_over(folder: Path, first: Path, second: Path) -> bool:
    """Whether a start warns of the second checkpoint and takes the first."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return newest(folder) == first and [str(second) in str(warning.message) for warning in told] == [True]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--places", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
        print(damages(Path(place) / "damages", arguments.flips), flush=True)
        print(full_disks(Path(place), arguments.places), flush=True)
        print(deaths(Path(place)), flush=True)


if __name__ == "__main__":
    main()
