"""A real recipe, as a user runs it, killed again and again and started again: does it end as the undisturbed run does?

    python -m tests.long.killed [--processes 2] [--kills 6] [--seed 0] CONFIG out=FOLDER [key.path=value ...]

Runs `accelerate launch ... -m train CONFIG` into FOLDER-straight, undisturbed, and into FOLDER, killed (SIGKILL, no
farewell) at random pictures: all of its processes at once or only one of them, whose company then ends too. Prints each
kill, then whether the last checkpoint, metrics, grids and exported model are the same; ends with 1 where they are not.
FOLDER/report.html tells of it.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import psutil

from tests.train.tiny import rows
from train.config import load_recipe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
PATIENCE = 90  # seconds that the company of a killed process may take to end


def start(processes: int, words: list[str], log: Path) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(processes),
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    with log.open("a") as file:
        return subprocess.Popen([*launcher, "-m", "train", *words], env=ENVIRONMENT, stdout=file, stderr=file,
                                start_new_session=True)  # fmt: skip


def pictures_of(out: Path) -> int:
    """Seen so far, as the log tells."""
    try:
        return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["pictures"]
    except (OSError, IndexError, ValueError):
        return 0


def ranks(launched: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, by rank."""
    below = psutil.Process(launched.pid).children(recursive=True)
    return sorted((process for process in below if "RANK" in process.environ()), key=lambda one: one.environ()["RANK"])


def disturb(launched: subprocess.Popen, out: Path, place: int, chance: random.Random) -> str:
    """Kills at the first sign of `place` pictures; tells what, when, and how long the others took to end."""
    while pictures_of(out) < place and launched.poll() is None:
        time.sleep(0.05)
    time.sleep(chance.uniform(0, 2))
    if launched.poll() is not None:
        return "ended before it could be killed"
    at, victims = pictures_of(out), ranks(launched)
    victim = chance.choice([None, *range(len(victims))])
    begin = time.monotonic()
    for process in victims if victim is None else [victims[victim]]:  # torchrun gives each a group of its own
        process.kill()
    if victim is None:
        os.killpg(launched.pid, signal.SIGKILL)
    code = launched.wait(PATIENCE)
    psutil.wait_procs(victims, PATIENCE)
    alive = sum(process.is_running() for process in victims)
    who = "all" if victim is None else f"process {victim}"
    return (f"killed {who} after {at} pictures; all had ended after {time.monotonic() - begin:.1f} s, "
            f"{alive} left, code {code}")  # fmt: skip


def finish(launched: subprocess.Popen, log: Path) -> None:
    if launched.wait():
        sys.exit(f"exit code {launched.returncode}\n{log.read_text()[-3000:]}")


def sums(out: Path, pattern: str) -> dict[str, str]:
    return {str(path.relative_to(out)): sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.glob(pattern)) if path.is_file()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG out=FOLDER key.path=value")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    recipe, chance = load_recipe(arguments.words[0], arguments.words[1:]), random.Random(arguments.seed)
    out = recipe.out
    straight = out.with_name(f"{out.name}-straight")
    for folder in (out, straight):
        if folder.exists():
            sys.exit(f"{folder} is there already")
        folder.mkdir(parents=True)
    log = out / "said.txt"
    finish(start(arguments.processes, [*arguments.words, f"out={straight}"], log), log)
    print(f"undisturbed: {recipe.pictures} pictures by {arguments.processes} processes", flush=True)
    for place in sorted(chance.randrange(recipe.pictures) for _ in range(arguments.kills)):
        print(disturb(start(arguments.processes, arguments.words, log), out, place, chance), flush=True)
    finish(start(arguments.processes, arguments.words, log), log)
    newest = max((straight / "checkpoints").iterdir()).name
    same = {"metrics.jsonl": rows(out) == rows(straight) != []}
    for part in (f"checkpoints/{newest}/*.safetensors", "samples/*", "model/**/*"):
        same[part] = sums(out, part) == sums(straight, part) != {}
    for part, alike in same.items():
        print(f"{part:40} {'the same' if alike else 'DIFFERENT'}")
    subprocess.run([sys.executable, "-m", "train", "report", str(out)], check=True)
    sys.exit(not all(same.values()))


if __name__ == "__main__":
    main()
