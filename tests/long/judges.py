"""`gaze evaluate` over one, two and three processes: the same report and page, to the byte.

python -m tests.long.judges
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.judges import asked_models, small_judges
from tests.small_pipeline import small_pipeline

ROOT = Path(__file__).resolve().parents[2]
DRAWN = ["--model", "model", "--steps", "2", "--prompts", "prompts.txt"]
COMMANDS = {
    "clip": ["clip", "--judge", "clip", *DRAWN],
    "siglip": ["clip", "--judge", "siglip", *DRAWN],
    "fid": ["fid", "--judge", "dinov2", "--real", "real", *DRAWN],
    "kid": ["kid", "--judge", "resnet", "--real", "real", "--pictures", "real"],
    "detect": ["detect", "--judge", "owl", "--colours", "clip", "--threshold", "0.9", "-n", "7", *DRAWN[:4]],
    "vqa": ["vqa", "--judge", "llava", "--score", "tifa", "-n", "11", *DRAWN[:4]],
    "shapes": ["shapes", "-n", "7", "--model", "model", "--steps", "2"],
}
LAUNCHER = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes"]  # fmt: skip


def run(place: Path, name: str, count: int) -> tuple[str, bytes]:
    start = [*LAUNCHER, str(count)] if count > 1 else [sys.executable]
    words = ["-m", "pipelines", "evaluate", *COMMANDS[name], "--json", "--page", f"{name}-{count}.html"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, *words], cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout, (place / f"{name}-{count}.html").read_bytes()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, random = Path(folder), np.random.default_rng(0)
        small_pipeline().save_pretrained(place / "model")
        for kinds, names in ((small_judges, "clip siglip dinov2 resnet"), (asked_models, "owl llava")):
            for name in names.split():
                getattr(kinds, name)(place / name)
        (place / "prompts.txt").write_text("".join(f"a red cat {number}\n" for number in range(41)))
        (place / "real").mkdir()
        for number in range(43):
            levels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(levels).resize((32, 32)).save(place / "real" / f"{number}.png")
        for name in COMMANDS:
            alone = run(place, name, 1)
            same = [run(place, name, count) == alone for count in (2, 3)]
            print(f"{name:<8} two processes: {'same' if same[0] else 'OTHER'}, three: {'same' if same[1] else 'OTHER'}")


if __name__ == "__main__":
    main()
