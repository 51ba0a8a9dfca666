"""A few pictures of coloured shapes with captions, drawn on the spot, for trying the trainer without any data."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from ..randomness import randomness

COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle")


def draw_folder(folder: Path, count: int, size: int, seed: int) -> Path:
    """Draws `count` pictures of `size` pixels with a metadata.jsonl; picture i is a function of (seed, i)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        random = randomness(seed, index, "drawn")
        colour, shape = COLOURS[random.integers(len(COLOURS))], SHAPES[random.integers(len(SHAPES))]
        radius = int(size * random.uniform(0.2, 0.35))
        x, y = (int(value) for value in random.integers(radius, size - radius, 2))
        picture = Image.new("RGB", (size, size), "white")
        draw = ImageDraw.Draw(picture)
        if shape == "circle":
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        else:
            draw.regular_polygon((x, y, radius), 4 if shape == "square" else 3, fill=colour)
        name = f"{index:05d}.png"
        picture.save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": f"a {colour} {shape}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")
    return folder
