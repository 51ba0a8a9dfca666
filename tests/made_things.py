"""Things of scenes that need no font: discs with patterns of their own, called by nouns of two words or one."""

import json

import numpy as np
from PIL import Image

from pipelines.scenes.things import Thing

NOUNS = {
    "apple": ("an apple", "apples", "une pomme", "pommes"),
    "bus": ("a bus", "buses", "un bus", "bus"),
    "cat": ("a cat", "cats", "un chat", "chats"),
    "dog": ("a dog", "dogs", "un chien", "chiens"),
    "egg": ("an egg", "eggs", "un œuf", "œufs"),
    "horse": ("a horse", "horses", "un cheval", "chevaux"),
    "key": ("a key", "keys", "une clé", "clés"),
    "red heart": ("a red heart", "red hearts", "un cœur rouge", "cœurs rouges"),
    "star": ("a star", "stars", "une étoile", "étoiles"),
    "tent": ("a tent", "tents", "une tente", "tentes"),
}


def _glyph(seed: int, side: int = 60) -> Image.Image:
    """Four fields of colours that no background has, in a disc."""
    levels_223 = np.random.default_rng(seed).choice([0, 60, 235], (2, 2, 3)).astype(np.uint8)
    pixels = Image.fromarray(levels_223).resize((side, side), Image.Resampling.BILINEAR).convert("RGBA")
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    pixels.putalpha(Image.fromarray(np.where(x**2 + y**2 <= (side / 2) ** 2, 255, 0).astype(np.uint8)))
    return pixels


THINGS = {
    name: Thing(name, {"en": said[:2], "fr": said[2:]}, _glyph(number))
    for number, (name, said) in enumerate(NOUNS.items())
}
GLYPHS = {name: thing.glyph for name, thing in THINGS.items()}


def write_glyphs(data):
    """As `python -m train data scenes` writes them."""
    folder = data / "glyphs"
    folder.mkdir(parents=True)
    lines = []
    for number, thing in enumerate(THINGS.values()):
        thing.glyph.save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "text": [], "name": thing.name, "nouns": thing.nouns}
        lines.append(json.dumps(row) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    return data
