"""Builds a captioned picture folder of emoji from three Debian packages, in the layout that the folder reader takes.

Pictures: Noto Color Emoji (OFL 1.1). English names and groups: Unicode's emoji-test.txt. Keywords, and names in other
languages: CLDR's annotations.

    OUT/train/      *.png, metadata.jsonl      {"file_name", "text": [captions], "repeats", "name", "group"} a line,
                                               and "name_fr", ... for each other language
    OUT/heldout/    the same, never trained on: a tenth of the names with exactly one skin tone
    OUT/summary.json
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from diffusion.errors import GazeError

from . import annotations, nouns
from .write import write_pictures

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
PACKAGES = {
    FONT: "fonts-noto-color-emoji",
    EMOJI_LIST: "unicode-data",
    **dict.fromkeys(annotations.FOLDERS, "unicode-cldr-core"),
}

STRIKE = 109  # the one size (pixels per em) of the font's bitmaps
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
CANVAS = 144  # square; leaves 4 pixels beside the glyph

SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")


class Emoji(NamedTuple):
    text: str  # the code points
    name: str
    group: str

    @property
    def file_name(self) -> str:
        return "-".join(f"{ord(c):x}" for c in self.text) + ".png"

    @property
    def key(self) -> str:
        """In CLDR's annotations."""
        return self.text.replace(annotations.VARIATION_SELECTOR, "")


def parse_emoji_list(lines: Iterable[str]) -> Iterator[Emoji]:
    """The fully-qualified emoji of a file in the format of emoji-test.txt (Unicode Technical Standard 51)."""
    group = ""
    for line in lines:
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif match := re.match(r"([0-9A-F ]+); fully-qualified\s+# \S+ E[\d.]+ (.+)", line):
            points, name = match.groups()
            yield Emoji("".join(chr(int(p, 16)) for p in points.split()), name.strip(), group)


def is_held_out(name: str) -> bool:
    """The held-out rule: exactly one skin tone in the name, and a tenth of those by hash."""
    return name.count("skin tone") == 1 and int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10 == 0


def idea(name: str) -> str:
    """The name without its skin tones: "man: dark skin tone, beard" -> "man: beard"."""
    base, _, details = name.partition(": ")
    kept = [d for d in details.split(", ") if d and not SKIN_TONE.fullmatch(d)]
    return f"{base}: {', '.join(kept)}" if kept else base


def spoken(name: str) -> str:
    """The name as one would say it: "dog" -> "a dog", "flag: Japan" -> "the flag of Japan",
    "man: dark skin tone, beard" -> "a man with dark skin tone and beard"."""
    base, _, details = name.partition(": ")
    if base == "flag":
        return f"the flag of {details}"
    article = "an" if base[0] in "aeiou" else "a"
    return f"{article} {base}" + (f" with {' and '.join(details.split(', '))}" if details else "")


# How a name is said by one who asks for the picture; in other languages as it stands.
SPOKEN = {"en": lambda emoji, name: spoken(name), "fr": lambda emoji, name: nouns.spoken_french(emoji.key, name)}


def in_language(emojis: Sequence[Emoji], language: str) -> dict[Emoji, annotations.Annotation]:
    """Name and keywords of those that have them; Unicode's list has the English names of all. Raises GazeError."""
    found = annotations.read_annotations(language)
    if language != "en":
        return {e: found[e.key] for e in emojis if e.key in found}
    nothing = annotations.Annotation("", [])
    return {e: found.get(e.key, nothing)._replace(name=e.name) for e in emojis}


def captions(name: str, aloud: str, keywords: list[str]) -> list[str]:
    """The name; the name as said aloud; the name and its keywords, if a keyword says more than the name."""
    keywords = [word for word in keywords if word.casefold() != name.casefold()]
    said = set(re.findall(r"\w+", name.casefold()))
    more = not all(said.issuperset(re.findall(r"\w+", word.casefold())) for word in keywords)
    return [*dict.fromkeys([name, aloud]), *([", ".join([name, *keywords])] if more else [])]


def repeats(variants: int, idea_balance: float) -> int:
    """How often a picture occurs per epoch when its idea has so many pictures: round(idea_balance / variants), >= 1.

    An idea with one picture is then seen `idea_balance` times per epoch, and one with many pictures once each:
    objects and flags are not drowned by people in six skin tones. 1: every picture once.
    """
    return max(1, round(idea_balance / variants))


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """One emoji, whole, centred on a white square, [size, size] RGB."""
    return _drawn(text, font, "white").convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def glyph(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One emoji alone, RGBA: the smallest square around it, transparent beside it, in the pixels of the font."""
    on_black = _drawn(text, font, (0, 0, 0, 0))  # so that levels are multiplied by alpha
    image = Image.frombytes("RGBa", on_black.size, on_black.tobytes()).convert("RGBA")
    left, top, right, bottom = image.getbbox() or (0, 0, CANVAS, CANVAS)
    side = max(right - left, bottom - top)
    left, top = (left + right - side) // 2, (top + bottom - side) // 2
    return image.crop((left, top, left + side, top + side))


def _drawn(text: str, font: ImageFont.FreeTypeFont, background: str | tuple[int, ...]) -> Image.Image:
    canvas = Image.new("RGBA", (CANVAS, CANVAS), background)
    corner = ((CANVAS - GLYPH_WIDTH) // 2, (CANVAS - GLYPH_HEIGHT) // 2)
    ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True)
    return canvas


def installed() -> tuple[list[Emoji], ImageFont.FreeTypeFont]:
    """Every emoji, and the font that draws them. Raises GazeError if a package is missing."""
    _require_packages()
    emojis = parse_emoji_list(EMOJI_LIST.read_text(encoding="utf-8").splitlines())
    return [*emojis], ImageFont.truetype(FONT, STRIKE, layout_engine=ImageFont.Layout.RAQM)


def build_emoji(
    out: Path,
    size: int = 64,
    idea_balance: float = 4.0,
    limit: int | None = None,
    languages: Sequence[str] = ("en",),
) -> dict[str, Any]:
    """Writes what `emoji_alone` draws to out/train and out/heldout; the same bytes on every run.

    Returns the summary that is also written to out/summary.json: counts, groups of identical pictures by name, and the
    names left out of train. Raises GazeError if a package or a language is missing or out is not writable.
    """
    splits, summary = emoji_alone(size, idea_balance, limit, languages)
    for split, of in splits.items():
        write_pictures(Path(out) / split, of)
    text = json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
    (Path(out) / "summary.json").write_text(text, encoding="utf-8")
    return summary


def emoji_alone(
    size: int, idea_balance: float = 4.0, limit: int | None = None, languages: Sequence[str] = ("en",)
) -> tuple[dict[str, list[tuple[Image.Image, dict[str, Any]]]], dict[str, Any]]:
    """Every emoji on white with its line of metadata.jsonl, by split, "train" and "heldout"; and a summary.

    size: pixels of a side. idea_balance: see `repeats`. limit: only the first so many emoji of the list. languages: of
    the captions, by CLDR's codes; an emoji without a name in one has no captions in it.
    A picture pixel-identical to a held-out one (the font draws some emoji alike) is left out of train, and so is
    a train caption that is also a held-out picture's, and a keyword that is a held-out name, in any of the languages.
    Raises GazeError if a package or a language is missing.
    """
    emojis, font = installed()
    emojis = emojis[:limit]
    if size < 1:
        raise GazeError(f"the size of the pictures is {size} pixels", "--size 64")
    said = {language: in_language(emojis, language) for language in languages}
    pictures = {emoji: draw(emoji.text, font, size) for emoji in emojis}

    alike: dict[bytes, list[Emoji]] = defaultdict(list)
    for emoji, picture in pictures.items():
        alike[picture.tobytes()].append(emoji)
    heldout = [e for e in emojis if is_held_out(e.name)]
    shown = {pictures[e].tobytes() for e in heldout}
    train = [e for e in emojis if pictures[e].tobytes() not in shown]
    variants = Counter(idea(e.name) for e in train)

    hidden = {of[e].name.casefold() for of in said.values() for e in heldout if e in of}

    def texts(emoji: Emoji) -> list[str]:
        found = []
        for language, of in said.items():
            if emoji in of:
                name, keywords = of[emoji]
                aloud = SPOKEN[language](emoji, name) if language in SPOKEN else name
                found += captions(name, aloud, [word for word in keywords if word.casefold() not in hidden])
        return found

    secret = {text for e in heldout for text in texts(e)}

    def drawn(emoji: Emoji, without: set[str], times: int) -> tuple[Image.Image, dict[str, Any]]:
        names = {f"name_{language}": of[emoji].name for language, of in said.items() if emoji in of}
        return pictures[emoji], {
            "file_name": emoji.file_name,
            "text": [text for text in texts(emoji) if text not in without],
            "repeats": times,
            "name": emoji.name,
            "group": emoji.group,
            **{key: name for key, name in names.items() if key != "name_en"},
        }

    splits = {
        "train": [drawn(e, secret, repeats(variants[idea(e.name)], idea_balance)) for e in train],
        "heldout": [drawn(e, set(), 1) for e in heldout],
    }
    used = {*train, *heldout}
    summary = {
        "size": size,
        "idea_balance": idea_balance,
        "train": len(train),
        "heldout": len(heldout),
        "ideas": len(variants),
        "pictures_per_epoch": sum(line["repeats"] for _, line in splits["train"]),
        "groups": dict(Counter(e.group for e in emojis)),
        "left_out_like_heldout": [e.name for e in emojis if e not in used],
        "duplicates": [[e.name for e in group] for group in alike.values() if len(group) > 1],
        **{f"without_name_{language}": len(emojis) - len(of) for language, of in said.items() if language != "en"},
    }
    return splits, summary


def _require_packages() -> None:
    missing = sorted({package for path, package in PACKAGES.items() if not path.exists()})
    if missing:
        paths = ", ".join(str(path) for path in PACKAGES if not path.exists())
        raise GazeError(f"the emoji need files that are not here: {paths}", f"apt-get install {' '.join(missing)}")
    if not features.check("raqm"):
        raise GazeError(
            "this Pillow was built without raqm, which joins the code points of an emoji", "pip install pillow"
        )
