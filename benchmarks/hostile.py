"""Opens files made to harm, in a process that notes what runs; prints what got through, most time and most memory.

    python benchmarks/hostile.py [--fuzz 20000] [--every 1] [--seed 0] [--json]

S1: pickles under innocent names. S2: headers of safetensors files, then --fuzz broken files. S3: configs and indices.
Each ends by opening or by a GazeError; what ends otherwise is "untyped". "ran" is what an audit hook saw of pickles,
other programs and sockets. Limits: 1 second and 64 MiB for each file (beside the weights that are read). Linux only.
"""

import argparse
import ctypes
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusion.convert import convert
from diffusion.errors import GazeError
from diffusion.pretrained import load_model
from pipelines.inspection import inspect
from tests.hostile import fuzzed, headers, payloads

MAKE = """
import sys
from diffusion.convert import convert
from tests.narrow_models import narrow_pipeline
narrow_pipeline("sd1").save_pretrained(sys.argv[1] + "/model")
convert(sys.argv[1] + "/model", sys.argv[1] + "/model.safetensors")
"""
WATCHED = ("pickle.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.", "socket.", "pty.")
STEM = "diffusion_pytorch_model"
PLACES = (
    *("model_index.json", "generation_config.json", "scheduler/scheduler_config.json"),
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    *(f"{part}/{STEM}.safetensors" for part in ("unet", "vae")),
    *(f"{part}/{STEM}.safetensors.index.json" for part in ("unet", "vae")),  # read where the one above is missing
    *(f"unet/{STEM}.fp16.safetensors", "text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json"),
    *(f"unet/{STEM}.bin", "text_encoder/pytorch_model.bin", "unet/model.pt", "run.py", "unet/unet.py"),
    *(f"tokenizer/{name}.json" for name in ("tokenizer", "tokenizer_config", "vocab", "special_tokens_map")),
    "tokenizer/merges.txt",
)
SINGLE = ("model.safetensors", "model", "picture.png", "model.ckpt", "model.bin", "model.pt", "model.pth", "a.json")
HUGE = (10**9, 2**63, 10**400, 2**20, [2**20] * 2, [2**20] * 3, [10**9] * 3, -1, 0, 0.5, None, "x", "../x", [], {})
NAMES = ("../x", "/etc", "", "\0", "a" * 10**6)
ENTRIES = (
    *(None, 5, "x", "", [], [None, None], [None, "x"], {}, {"a": 1}, [5, 6], [["diffusers"], ["x"]], ["x" * 10**6] * 2),
    *(["os", "system"], ["subprocess", "Popen"], ["../evil", "Evil"], ["evil", "Evil"], ["diffusers", "evil.Evil"]),
    *(["diffusers", "UNet9DModel"], ["diffusers", "../unet"], ["diffusers"], True, ["builtins", "eval"], "../unet"),
)


class Tally:
    """What came of a kind of files."""

    def __init__(self) -> None:
        self.n, self.seconds, self.bytes, self.untyped = 0, (0.0, ""), (0, ""), []  # type: ignore[var-annotated]

    def try_all(self, name: str, *actions: Callable[[], Any]) -> None:
        for action in actions:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
            before, begin = memory("VmRSS"), time.process_time()
            try:
                action()
            except GazeError as error:
                if len(str(error).splitlines()) > 3 or len(str(error)) > 2000:
                    self.untyped.append(f"{name}: a long message")
            except Exception as error:
                self.untyped.append(f"{name}: {error!r:.200}")
            self.n += 1
            self.seconds = max(self.seconds, (round(time.process_time() - begin, 3), name))
            self.bytes = max(self.bytes, (memory("VmHWM") - before, name))


def memory(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def watch() -> list[str]:
    """What runs from now on: the events, with their first argument. Every payload names a function, which is one; torch
    has a reader of pickles of its own, so a call of that is noted in its place."""
    seen: list[str] = []

    def note(event: str, arguments: tuple) -> None:
        if event.startswith(WATCHED):
            seen.append(f"{event} {arguments[:1]}")

    sys.addaudithook(note)
    torch.load = lambda *_, **__: seen.append("torch.load")  # type: ignore[assignment]
    return seen


def changed(path: Path, content: bytes) -> Iterator[None]:
    """The file with another content, until the next."""
    whole = path.read_bytes() if path.is_file() else None
    path.write_bytes(content)
    yield
    path.unlink() if whole is None else path.write_bytes(whole)


def folder_actions(folder: Path) -> tuple[Callable[[], Any], ...]:
    into = folder.with_name("written.safetensors")
    return partial(load_model, folder), partial(convert, folder, into)


def file_actions(path: Path) -> tuple[Callable[[], Any], ...]:
    return partial(load_model, path), partial(inspect, path), partial(convert, path, path.with_name("written"))


def pickles(place: Path) -> Tally:
    tally = Tally()
    folder = place / "model"
    for body, name, single in zip(payloads(), itertools.cycle(PLACES), itertools.cycle(SINGLE), strict=False):
        # What is read only where something else is missing.
        hidden = {".index.json": "s.index.json", ".fp16.safetensors": ".fp16.safetensors", ".bin": ".bin"}
        other = next((name.replace(end, "") for end in hidden if name.endswith(end)), None)
        aside = None
        for candidate in (f"{other}.safetensors", other):
            if other is not None and candidate != name and (folder / str(candidate)).is_file():
                aside = folder / str(candidate)
        if name.endswith(("vocab.json", "merges.txt")):
            aside = folder / "tokenizer" / "tokenizer.json"
        if aside is not None:
            aside.rename(place / "aside")
        for _ in changed(folder / name, body):
            tally.try_all(name, *folder_actions(folder))
        if aside is not None:
            (place / "aside").rename(aside)
        for _ in changed(place / "single" / single, body):
            tally.try_all(single, *file_actions(place / "single" / single))
    return tally


def broken(place: Path, fuzz: int, seed: int) -> Tally:
    tally = Tally()
    path, whole = place / "single" / "model.safetensors", (place / "model.safetensors").read_bytes()
    for name, text in headers().items():
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        tally.try_all(name, *file_actions(path))
    chance = random.Random(seed)
    part = place / "model" / "vae" / f"{STEM}.safetensors"
    part_whole = part.read_bytes()
    for number in range(fuzz):
        path.write_bytes(fuzzed(whole, chance))
        tally.try_all(f"fuzzed {number}", partial(load_model, path))
        for _ in changed(part, fuzzed(part_whole, chance)):
            tally.try_all(f"fuzzed part {number}", partial(load_model, place / "model"))
    path.unlink()
    return tally


def configs(place: Path, every: int) -> Tally:
    tally = Tally()
    folder = place / "model"
    for name in ("evil.py", "Evil.py"):
        for where in (place, folder, folder / "unet"):
            (where / name).write_text("open('ran', 'w')")
    index = json.loads((folder / "model_index.json").read_text())
    contents: list[tuple[str, Any]] = [("model_index.json", index | {key: e}) for key in index for e in ENTRIES]
    contents += [("model_index.json", index | {name: ["diffusers", "X"]}) for name in NAMES]
    contents += [("model_index.json", entry) for entry in ENTRIES]
    for name in ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"):
        config = json.loads((folder / name).read_text())
        contents += [(name, config | {option: value}) for option in config for value in HUGE]
        contents += [(name, config | more) for more in ({"custom_pipeline": "evil"}, {"auto_map": {"A": "evil.Evil"}})]
    for name, content in contents[::every]:
        for _ in changed(folder / name, json.dumps(content).encode()):
            tally.try_all(f"{name} {str(content)[-80:]}", partial(load_model, folder), partial(inspect, folder))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuzz", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the configs of S3, each N-th")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made).resolve()
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": root}
        subprocess.run([sys.executable, "-c", MAKE, str(place)], env=environment, check=True, capture_output=True)
        (place / "single").mkdir()
        shutil.copytree(place / "model" / "tokenizer", place / "single" / "tokenizer")
        os.chdir(place)
        shutil.copy(place / "model.safetensors", place / "single")
        for action in (*folder_actions(place / "model"), *file_actions(place / "single" / "model.safetensors")):
            action()  # what it imports, before anybody looks
        for left in (place / "written.safetensors", place / "single" / "model.safetensors"):
            left.unlink()
        shutil.rmtree(place / "single" / "written")
        before, seen = set(sys.modules), watch()
        kinds = {
            "S1": lambda: pickles(place),
            "S2": lambda: broken(place, arguments.fuzz, arguments.seed),
            "S3": lambda: configs(place, arguments.every),
        }
        report: dict[str, Any] = {}
        for name, kind in kinds.items():
            tally = kind()
            report[name] = {"n": tally.n, "seconds": tally.seconds, "bytes": tally.bytes, "untyped": tally.untyped}
        report["ran"] = seen[:] + [str(path) for path in place.rglob("ran")]
        report["imported"] = sorted(set(sys.modules) - before)
        # The watch sees what it should: the event of an unpickled function, without one.
        count = len(seen)
        sys.audit("pickle.find_class", "os", "system")
        report["control"] = seen[count:]
        os.chdir(root)
    if arguments.json:
        print(json.dumps(report))
        return
    for name in kinds:
        found = report[name]
        print(
            f"{name}: opened {found['n']} times, {len(found['untyped'])} untyped, most {found['seconds'][0]:.2f} s, "
            f"{found['bytes'][0] / 2**20:.0f} MiB ({found['seconds'][1][:60]}; {found['bytes'][1][:60]})"
        )
        print(*(f"  {line}" for line in found["untyped"][:10]), sep="\n")
    print(f"ran: {report['ran']}; imported: {report['imported']}; the watch sees: {report['control']}")


if __name__ == "__main__":
    main()
