"""Contact sheets: many pictures in one, labelled."""

import unicodedata
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from diffusion.errors import GazeError

from .images import WHITE, to_rgb


def scale_of(images: Sequence[Image.Image]) -> int:
    """How many times small pictures are enlarged on a sheet: to about 128 pixels."""
    return max(1, 128 // max(image.width for image in images))


def grid(
    images: Sequence[Image.Image], columns: int, labels: Sequence[str] | None = None, scale: int = 1
) -> Image.Image:
    """A contact sheet, row by row on white, pictures enlarged by `scale`; labels stand below, broken into lines."""
    if not images or columns < 1:
        raise GazeError(
            f"a sheet of {len(images)} pictures in {columns} columns cannot be drawn", "at least one of each"
        )
    if labels is not None and len(labels) != len(images):
        raise GazeError(f"{len(labels)} labels for {len(images)} pictures", "one label per picture")
    columns, gap = min(columns, len(images)), 6
    width = max(image.width for image in images) * scale
    height = max(image.height for image in images) * scale
    font, line_height = _font(width)
    blocks = [_break_lines(label, width, font) for label in labels or [""] * len(images)]
    lines = [max(map(len, blocks[start : start + columns])) for start in range(0, len(blocks), columns)]  # of each row
    tops = [*accumulate((height + line_height * count + gap for count in lines), initial=gap)]
    cell_width = width + gap
    sheet = Image.new("RGB", (columns * cell_width + gap, tops[-1]), WHITE)
    draw = ImageDraw.Draw(sheet)
    for index, (image, block) in enumerate(zip(images, blocks, strict=True)):
        left, top = gap + index % columns * cell_width, tops[index // columns]
        sheet.paste(_enlarged(image, scale), (left, top))
        _write(draw, block, left, top + height, font, line_height)
    return sheet


def table(
    images: Sequence[Image.Image], across: Sequence[str], down: Sequence[str], blocks: Sequence[str]
) -> Image.Image:
    """A sheet of labelled axes: columns and rows, one block of them under another, labels along top and left.

    images: those of the first row of the first block first. across, down, blocks: the labels of columns, rows and
    blocks; an empty one takes no room. Pictures may differ in size: a column is as wide as its widest.
    """
    gap, scale = 6, scale_of(images)
    columns, rows = len(across), len(down)
    widths = [max(image.width for image in images[column::columns]) * scale for column in range(columns)]
    font, line_height = _font(max(widths))
    left_lines = [_break_lines(label, max(widths), font) for label in down]
    top_lines = [_break_lines(label, width, font) for label, width in zip(across, widths, strict=True)]
    left = gap + int(max((font.getlength(line) + gap for lines in left_lines for line in lines), default=0))
    title_lines = [_break_lines(label, left + sum(widths), font) for label in blocks]
    lefts = [left + sum(widths[:column]) + gap * column for column in range(columns)]
    heads = line_height * max(len(lines) for lines in top_lines)
    heights = [
        max(max(image.height for image in images[start : start + columns]) * scale, line_height * len(left_lines[row]))
        for start, row in zip(range(0, len(images), columns), [*range(rows)] * len(blocks), strict=True)
    ]
    titles = [line_height * len(lines) + gap for lines in title_lines]
    size = (lefts[-1] + widths[-1] + gap, sum(heights) + gap * len(heights) + sum(titles) + heads * len(blocks) + gap)
    sheet = Image.new("RGB", size, WHITE)
    draw, top = ImageDraw.Draw(sheet), 0
    for block, lines in enumerate(title_lines):
        _write(draw, lines, gap, top + gap // 2, font, line_height)
        top += titles[block]
        for labels, x in zip(top_lines, lefts, strict=True):
            _write(draw, labels, x, top, font, line_height)
        top += heads
        for row in range(rows):
            start = (block * rows + row) * columns
            _write(draw, left_lines[row], gap, top, font, line_height)
            for image, x in zip(images[start : start + columns], lefts, strict=True):
                sheet.paste(_enlarged(image, scale), (x, top))
            top += heights[block * rows + row] + gap
    return sheet


def _font(width: int) -> tuple[Any, int]:
    """A font that suits pictures of this width, and the height of its lines."""
    font = ImageFont.load_default(size=max(10, width // 11))
    return font, sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12


def _enlarged(image: Image.Image, scale: int) -> Image.Image:
    size = (image.width * scale, image.height * scale)
    return to_rgb(image).resize(size, Image.Resampling.BICUBIC) if scale > 1 else to_rgb(image)


def _write(draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, font: Any, line_height: int) -> None:
    for row, line in enumerate(lines):
        draw.text((x, y + row * line_height), line, fill=(60, 60, 60), font=font)


def printable(text: str) -> str:
    """A text in one line, ? for each letter that cannot be shown."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _break_lines(text: str, width: float, font: Any) -> list[str]:
    """Words of `text` in lines at most `width` pixels wide; longer words are broken. Letters lose their marks, because
    Pillow's own font has none that bear one."""
    letters = unicodedata.normalize("NFKD", printable(text))
    lines = [""]
    for word in "".join(letter for letter in letters if not unicodedata.combining(letter)).split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines[1:]
