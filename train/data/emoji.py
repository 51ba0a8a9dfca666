"""Builds a captioned picture folder of emoji from three Debian packages, in the layout that the folder reader takes.

Pictures: Noto Color Emoji (OFL 1.1). Names and groups: Unicode's emoji-test.txt. Keywords: CLDR's English annotations.

    OUT/train/      *.png, metadata.jsonl      {"file_name", "text": [captions], "repeats", "name", "group"} a line
    OUT/heldout/    the same, never trained on: a tenth of the names with exactly one skin tone
    OUT/summary.json
"""

import hashlib
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from diffusion.errors import GazeError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotations/en.xml")
DERIVED_ANNOTATIONS = Path("/usr/share/unicode/cldr/common/annotationsDerived/en.xml")
PACKAGES = {
    FONT: "fonts-noto-color-emoji",
    EMOJI_LIST: "unicode-data",
    ANNOTATIONS: "unicode-cldr-core",
    DERIVED_ANNOTATIONS: "unicode-cldr-core",
}

STRIKE = 109  # the one size (pixels per em) of the font's bitmaps
GLYPH_WIDTH, GLYPH_HEIGHT = 136, 128
CANVAS = 144  # square; leaves 4 pixels beside the glyph
VARIATION_SELECTOR = "\ufe0f"  # absent from CLDR's keys

SKIN_TONE = re.compile(r"(?:medium-light|medium-dark|light|medium|dark) skin tone")


class Emoji(NamedTuple):
    text: str  # the code points
    name: str
    group: str

    @property
    def file_name(self) -> str:
        return "-".join(f"{ord(c):x}" for c in self.text) + ".png"


def parse_emoji_list(lines: Iterable[str]) -> Iterator[Emoji]:
    """The fully-qualified emoji of a file in the format of emoji-test.txt (Unicode Technical Standard 51)."""
    group = ""
    for line in lines:
        if line.startswith("# group:"):
            group = line.removeprefix("# group:").strip()
        elif match := re.match(r"([0-9A-F ]+); fully-qualified\s+# \S+ E[\d.]+ (.+)", line):
            points, name = match.groups()
            yield Emoji("".join(chr(int(p, 16)) for p in points.split()), name.strip(), group)


def parse_annotations(xml: str | bytes) -> dict[str, list[str]]:
    """{emoji without variation selectors: its keywords} of a CLDR annotations file."""
    return {
        node.attrib["cp"]: [word.strip() for word in (node.text or "").split("|")]
        for node in ElementTree.fromstring(xml).iter("annotation")
        if "type" not in node.attrib  # type="tts" is the name
    }


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


def captions(name: str, keywords: list[str]) -> list[str]:
    """The name; the name as spoken; the name and its keywords, if a keyword says more than the name."""
    keywords = [word for word in keywords if word.casefold() != name.casefold()]
    said = set(re.findall(r"\w+", name.casefold()))
    if all(said.issuperset(re.findall(r"\w+", word.casefold())) for word in keywords):
        return [name, spoken(name)]
    return [name, spoken(name), ", ".join([name, *keywords])]


def repeats(variants: int, idea_balance: float) -> int:
    """How often a picture occurs per epoch when its idea has so many pictures: round(idea_balance / variants), >= 1.

    An idea with one picture is then seen `idea_balance` times per epoch, and one with many pictures once each:
    objects and flags are not drowned by people in six skin tones. 1: every picture once.
    """
    return max(1, round(idea_balance / variants))


def draw(text: str, font: ImageFont.FreeTypeFont, size: int) -> Image.Image:
    """One emoji, whole, centred on a white square, [size, size] RGB."""
    canvas = Image.new("RGBA", (CANVAS, CANVAS), "white")
    corner = ((CANVAS - GLYPH_WIDTH) // 2, (CANVAS - GLYPH_HEIGHT) // 2)
    ImageDraw.Draw(canvas).text(corner, text, font=font, embedded_color=True)
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def build_emoji(out: Path, size: int = 64, idea_balance: float = 4.0, limit: int | None = None) -> dict:
    """Draws every emoji into out/train and out/heldout; the same bytes on every run.

    size: pixels of a side. idea_balance: see `repeats`. limit: only the first so many emoji of the list.
    A picture pixel-identical to a held-out one (the font draws some emoji alike) is left out of train, and so is
    a train caption that is also a held-out picture's.
    Returns the summary that is also written to out/summary.json: counts, groups of identical pictures by name, and the
    names left out of train. Raises GazeError if a package is missing or out is not writable.
    """
    _require_packages()
    if size < 1:
        raise GazeError(f"the size of the pictures is {size} pixels", "--size 64")
    font = ImageFont.truetype(FONT, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    emojis = list(parse_emoji_list(EMOJI_LIST.read_text(encoding="utf-8").splitlines()))[:limit]
    keywords = parse_annotations(ANNOTATIONS.read_bytes()) | parse_annotations(DERIVED_ANNOTATIONS.read_bytes())
    pictures = {emoji: draw(emoji.text, font, size) for emoji in emojis}

    alike: dict[bytes, list[Emoji]] = defaultdict(list)
    for emoji, picture in pictures.items():
        alike[picture.tobytes()].append(emoji)
    heldout = [e for e in emojis if is_held_out(e.name)]
    shown = {pictures[e].tobytes() for e in heldout}
    train = [e for e in emojis if pictures[e].tobytes() not in shown]
    variants = Counter(idea(e.name) for e in train)

    texts = {e: captions(e.name, keywords.get(e.text.replace(VARIATION_SELECTOR, ""), [])) for e in emojis}
    secret = {text for e in heldout for text in texts[e]}

    def record(emoji: Emoji, text: list[str], times: int) -> dict:
        return {"file_name": emoji.file_name, "text": text, "repeats": times, "name": emoji.name, "group": emoji.group}

    records = {
        "train": [
            record(e, [t for t in texts[e] if t not in secret], repeats(variants[idea(e.name)], idea_balance))
            for e in train
        ],
        "heldout": [record(e, texts[e], 1) for e in heldout],
    }
    used = {*train, *heldout}
    summary = {
        "size": size,
        "idea_balance": idea_balance,
        "train": len(train),
        "heldout": len(heldout),
        "ideas": len(variants),
        "pictures_per_epoch": sum(r["repeats"] for r in records["train"]),
        "groups": dict(Counter(e.group for e in emojis)),
        "left_out_like_heldout": [e.name for e in emojis if e not in used],
        "duplicates": [[e.name for e in group] for group in alike.values() if len(group) > 1],
    }
    _write(Path(out), {e.file_name: picture for e, picture in pictures.items()}, records, summary)
    return summary


def _write(out: Path, pictures: dict[str, Image.Image], records: dict[str, list[dict]], summary: dict) -> None:
    try:
        for split, lines in records.items():
            folder = out / split
            folder.mkdir(parents=True, exist_ok=True)
            for line in lines:
                pictures[line["file_name"]].save(folder / line["file_name"])
            metadata = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (folder / "metadata.jsonl").write_text(metadata, encoding="utf-8")
        text = json.dumps(summary, ensure_ascii=False, indent=1) + "\n"
        (out / "summary.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise GazeError(f"cannot write the emoji folder {out}: {error}", "a folder you may write to") from error


def _require_packages() -> None:
    missing = sorted({package for path, package in PACKAGES.items() if not path.is_file()})
    if missing:
        paths = ", ".join(str(path) for path in PACKAGES if not path.is_file())
        raise GazeError(f"the emoji need files that are not here: {paths}", f"apt-get install {' '.join(missing)}")
    if not features.check("raqm"):
        raise GazeError(
            "this Pillow was built without raqm, which joins the code points of an emoji", "pip install pillow"
        )
