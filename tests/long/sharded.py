"""Two CPU processes that share the model out against one that has all of it, for 50 steps of U-Net and text encoder
together (P3), in each way that is there. Prints how far the weights are apart; ends with 1 if more than 1e-6.

    python -m tests.long.sharded [WAY ...]
"""

import sys
import tempfile
import time
from pathlib import Path

from tests.distributed.test_sharded import WAYS, known
from tests.distributed.test_two_processes import finish
from tests.train.tiny import difference, make_pictures, make_vae, run_here, start_two, tiny_recipe

STEPS = 50


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="sharded-") as folder:
        return measure(Path(folder))


def measure(folder: Path) -> int:
    pictures, vae = make_pictures(folder / "pictures"), make_vae(folder / "vae")
    options = {"pictures": 8 * STEPS, "checkpoint_every": 8 * STEPS, "data": {"cache": folder / "cache"}}
    run_here(tiny_recipe(folder / "alone", pictures, vae, **options))
    ways = {"whole": {}} | {way.id: way.values[0] for way in WAYS if not any(mark.args[0] for mark in way.marks)}
    worst = 0.0
    for name in sys.argv[1:] or ways:
        begin = time.monotonic()
        codes = finish(start_two(tiny_recipe(folder / name, pictures, vae, **options), **ways[name]), 600)
        assert codes == [0, 0], codes
        apart = {
            part: difference(known(folder / "alone", part), known(folder / name, part))
            for part in ("model", "ema", "optimizer")
        }
        parts = ", ".join(f"{part} {value:.1e}" for part, value in apart.items())
        print(
            f"{name}: {time.monotonic() - begin:.0f} s, {STEPS} steps, apart by {parts}, relative to the largest",
            flush=True,
        )
        worst = max(worst, *apart.values())
    return int(worst > 1e-6)


if __name__ == "__main__":
    sys.exit(main())
