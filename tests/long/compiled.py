"""Trains a tiny model with and without torch.compile, whose code for the CPU takes a minute to make, and then with
activations computed twice too. Prints seconds and how far the losses are apart; ends with 1 if more than 1e-4.

    python -m tests.long.compiled
"""

import sys
import tempfile
import time
from pathlib import Path

from tests.train.tiny import difference, make_pictures, make_vae, rows, run_here, tiny_recipe, weights

KINDS = {"plain": {}, "compiled": {"compile": True}, "both": {"compile": True, "gradient_checkpointing": True}}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
        return measure(Path(folder))


def measure(folder: Path) -> int:
    pictures, vae = make_pictures(folder / "pictures"), make_vae(folder / "vae")
    worst = 0.0
    for kind, options in KINDS.items():
        begin = time.monotonic()
        run_here(tiny_recipe(folder / kind, pictures, vae, pictures=32, log_every=8, **options))
        seconds = time.monotonic() - begin
        losses = zip(rows(folder / kind), rows(folder / "plain"), strict=True)
        apart = max(abs(one["loss"] - other["loss"]) / other["loss"] for one, other in losses)
        moved = difference(weights(folder / kind), weights(folder / "plain"))
        assert weights(folder / kind).keys() == weights(folder / "plain").keys()
        print(f"{kind}: {seconds:.0f} s, losses {apart:.1e} apart, weights {moved:.1e} of the largest")
        worst = max(worst, apart)
    return int(worst > 1e-4)


if __name__ == "__main__":
    sys.exit(main())
