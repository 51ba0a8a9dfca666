"""Reads broken, odd and hostile pictures and shards, at the counts of the protocol; prints what was left out or found.

    python benchmarks/decode.py [--count 10000] [--seed 0]

D1: --count pictures, 1 % of them odd in twelve ways, read by two workers and alone. D3: bombs, each in a new process,
and the most memory. D4: a shard of 100 pictures cut every 64 bytes, and with 500 single bits flipped. D2, every kind of
picture in every orientation, is tests/train/test_decode.py, hostile members of shards are test_shards.py. Linux only.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from diffusion.errors import GazeError
from tests.pictures import odd_folder, saved
from tests.train.tiny import make_pictures
from train.data.check import check
from train.data.folder import Folder
from train.data.look import look
from train.data.pack import pack
from train.data.shards import Shards

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import re, sys
from pathlib import Path
from diffusion.errors import GazeError
from train.data.decode import probe
from tests.pictures import picture, saved
for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
    probe(saved(picture(0), kind))
def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
try:
    probe(Path(sys.argv[1]).read_bytes())
    print("opened")
except GazeError:
    print(memory("VmHWM") - before)
"""


def pictures(place: Path, count: int, seed: int) -> None:
    good, bad = odd_folder(place / "data", count, count // 100, seed)
    begin = time.perf_counter()
    source, skipped = look(Folder(place / "data"), workers=2)
    seconds = time.perf_counter() - begin
    alone, same = look(Folder(place / "data"))
    right = [record.name for record in source] == good and [item.name for item in skipped] == bad
    alike = (list(alone), same) == (list(source), skipped)
    print(
        f"D1: {count} pictures, {count // 100} odd: {len(skipped)} of {len(bad)} that must be are left out, "
        f"{'exactly those' if right else 'NOT those'}; {'the same' if alike else 'NOT the same'} with and without "
        f"workers; {count / seconds:.0f} pictures of 16 x 16 a second with two"
    )


def bombs(place: Path) -> None:
    made = {
        "8000 x 8000, 1 bit.png": saved(Image.new("1", (8000, 8000)), "PNG"),
        "16000 x 16000, 1 bit.png": saved(Image.new("1", (16000, 16000)), "PNG"),
        "8000 x 8000.jpg": saved(Image.new("L", (8000, 8000)), "JPEG"),
        "8000 x 8000.webp": saved(Image.new("RGB", (8000, 8000)), "WEBP", lossless=True, method=0),
        "8000 x 8000, 1 bit.bmp": saved(Image.new("1", (8000, 8000)), "BMP"),
        "8000 x 8000.gif": saved(Image.new("L", (8000, 8000)), "GIF"),
    }
    most = (0.0, "")
    for name, content in made.items():
        (place / name).write_bytes(content)
        done = subprocess.run([sys.executable, "-c", PROBE, place / name], cwd=ROOT, capture_output=True, text=True)
        if not re.fullmatch(r"-?[\d.]+\n", done.stdout):
            sys.exit(f"{name}: {done.stdout}{done.stderr}")
        most = max(most, (float(done.stdout), name))
    print(f"D3: {len(made)} bombs, all refused; most memory {most[0]:.1f} MiB ({most[1]})")


def shards(place: Path, seed: int) -> None:
    out = place / "shards"
    pack(Folder(make_pictures(place / "small", 100)), out, 100)
    tar = out / "00000.tar"
    whole = tar.read_bytes()
    cuts = range(0, len(whole), 64)
    seen = 0
    for end in cuts:
        tar.write_bytes(whole[:end])
        seen += refused(out)
    print(f"D4: {seen} of {len(cuts)} cuts refused when the shards are opened")
    places = random.Random(seed).sample(range(len(whole)), 500)
    seen = read = hit = 0
    lines = [json.loads(line) for line in (out / "00000.jsonl").read_text().splitlines()]
    for position in places:
        tar.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        seen += any(True for _ in check(Shards(str(out), out)))
        inside = [n for n, line in enumerate(lines) if line["offset"] <= position < line["offset"] + line["size"]]
        hit += len(inside)
        read += sum(refused(out, index) for index in inside)
    print(f"D4: {seen} of {len(places)} flipped bits found by check, {read} of {hit} in pictures refused when read")


def refused(out: Path, *indices: int) -> bool:
    try:
        opened = Shards(str(out), out)
        for index in indices:
            opened.read(index)
    except GazeError:
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        pictures(place, arguments.count, arguments.seed)
        bombs(place)
        shards(place, arguments.seed)


if __name__ == "__main__":
    main()
