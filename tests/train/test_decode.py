"""The decode contract, held against PNGs written by hand and arithmetic in float64."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.errors import GazeError
from tests.pictures import GREY, GREY_ALPHA, PALETTE, RGB, RGB_ALPHA, chunk, exif, picture, png, saved
from train.data.decode import colour, crop_of, decode, probe

ROOT = Path(__file__).resolve().parent.parent.parent
BACKGROUND = (200, 30, 90)
SIZE = (5, 7)
RANDOM = np.random.default_rng(0)
COLOURS = RANDOM.integers(0, 256, (256, 3))
ALPHAS = RANDOM.integers(0, 256, 256)

# How a camera stores an upright picture under each orientation (EXIF 2.3, table 6).
STORED = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.swapaxes(0, 1),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),
    8: lambda upright: np.rot90(upright, -1),
}
# Colour type, bits, and how transparency is stored apart from the samples.
KINDS = {
    "grey1": (GREY, 1, ""),
    "grey2": (GREY, 2, ""),
    "grey4": (GREY, 4, ""),
    "grey8": (GREY, 8, ""),
    "grey16": (GREY, 16, ""),
    "grey8 clear level": (GREY, 8, "level"),
    "grey16 clear level": (GREY, 16, "level"),
    "grey8 alpha": (GREY_ALPHA, 8, ""),
    "grey16 alpha": (GREY_ALPHA, 16, ""),
    "rgb8": (RGB, 8, ""),
    "rgb16": (RGB, 16, ""),
    "rgb8 clear colour": (RGB, 8, "level"),
    "rgb8 alpha": (RGB_ALPHA, 8, ""),
    "rgb16 alpha": (RGB_ALPHA, 16, ""),
    "palette4": (PALETTE, 4, ""),
    "palette8": (PALETTE, 8, ""),
    "palette8 alpha": (PALETTE, 8, "table"),
}


def levels(pixels_CHW):
    return ((pixels_CHW.double() + 1) * 127.5).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_in_every_orientation(kind, orientation):
    colour_type, depth, clear = KINDS[kind]
    channels = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGB_ALPHA: 4}[colour_type]
    values = np.random.default_rng([colour_type, depth]).integers(0, 2**depth, (*SIZE, channels))
    scaled = values / (2**depth - 1)
    rgb = (
        COLOURS[values[..., 0]] / 255
        if colour_type == PALETTE
        else scaled[..., [0, 0, 0] if channels < 3 else [0, 1, 2]]
    )
    alpha = scaled[..., -1:] if colour_type in (GREY_ALPHA, RGB_ALPHA) else np.ones((*SIZE, 1))
    extra = [chunk(b"PLTE", COLOURS[: 2**depth].astype(np.uint8).tobytes())] if colour_type == PALETTE else []
    if clear == "table":
        alpha = ALPHAS[values] / 255
        extra.append(chunk(b"tRNS", ALPHAS.astype(np.uint8).tobytes()))
    elif clear == "level":
        alpha = (values != values[2, 3]).any(-1, keepdims=True)
        extra.append(chunk(b"tRNS", values[2, 3].astype(">u2").tobytes()))
    reference = 255 * rgb * alpha + np.array(BACKGROUND) * (1 - alpha)

    file = png(STORED[orientation](values), depth, colour_type, chunk(b"eXIf", exif(orientation)), *extra)
    pixels, original, crop = decode(file, SIZE, background=BACKGROUND)
    assert (original, crop) == (SIZE, (0, 0))
    np.testing.assert_allclose(
        levels(pixels), reference, atol=1.5 if depth == 16 else 1.01
    )  # PIL keeps the high byte of colours
    assert probe(file) == SIZE


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind, options", [("JPEG", {"quality": 100, "subsampling": 0}), ("WEBP", {"lossless": True})])
def test_orientation_in_other_formats(kind, options, orientation):
    upright = np.kron(np.arange(1, 25).reshape(4, 6, 1) * 10, np.ones((8, 8, 3))).astype(np.uint8)
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    file = saved(stored, kind, exif=b"Exif\0\0" + exif(orientation), **options)
    np.testing.assert_allclose(levels(decode(file, upright.shape[:2])[0]), upright, atol=3)


def test_cmyk_grey_and_clear_pixels_in_other_formats():
    cmyk = np.kron(RANDOM.integers(0, 256, (2, 3, 4)), np.ones((8, 8, 1))).astype(np.uint8)
    file = saved(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    inks = cmyk / 255
    np.testing.assert_allclose(
        levels(decode(file, (16, 24))[0]), 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:]), atol=6
    )
    grey = saved(Image.new("L", (8, 8), 77), "JPEG")
    np.testing.assert_allclose(levels(decode(grey, (8, 8))[0]), 77, atol=1)
    half = saved(Image.new("RGBA", (8, 8), (0, 0, 0, 51)), "WEBP", lossless=True)
    np.testing.assert_allclose(
        levels(decode(half, (8, 8), background=BACKGROUND)[0]), np.full((8, 8, 3), 0.8) * BACKGROUND, atol=1
    )
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 250, 250, 250])
    clear = saved(palette, "GIF", transparency=1)
    np.testing.assert_allclose(
        levels(decode(clear, (8, 8), background=BACKGROUND)[0][:, :1, :1]), [[BACKGROUND]], atol=1
    )
    np.testing.assert_allclose(levels(decode(saved(palette, "BMP"), (8, 8))[0]), 250, atol=0.01)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_several_pictures_the_first_is_taken(kind):
    colours = [Image.new("RGB", (8, 8), name) for name in ("red", "lime", "blue")]
    options = {} if kind == "GIF" else {"lossless": True} if kind == "WEBP" else {}
    file = saved(colours[0], kind, save_all=True, append_images=colours[1:], duration=50, **options)
    assert Image.open(io.BytesIO(file)).n_frames == 3
    np.testing.assert_allclose(levels(decode(file, (8, 8))[0])[0, 0], (255, 0, 0), atol=1)


@pytest.mark.parametrize("body", [b"garbage", b"", b"MM\0*\0\0\0\x08\0\xff" + b"\xff" * 20, exif(9), exif(0)])
def test_metadata_that_says_nothing_turns_nothing(body):
    file = png(np.arange(12).reshape(3, 4, 1) * 20, 8, GREY, chunk(b"eXIf", body))
    np.testing.assert_allclose(levels(decode(file, (3, 4))[0])[..., 0], np.arange(12).reshape(3, 4) * 20, atol=0.01)


# Size and place


def lanczos(values, count):
    """Lanczos with a = 3 along the first axis, widened where it makes smaller (Duchon 1979), in float64."""
    scale = len(values) / count
    wide = max(scale, 1.0)
    offsets = (np.arange(len(values)) + 0.5 - (np.arange(count)[:, None] + 0.5) * scale) / wide
    weights = np.where(abs(offsets) < 3, np.sinc(offsets) * np.sinc(offsets / 3), 0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), values, 1)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    "original, size, covering",
    [
        ((60, 40), (16, 16), (24, 16)),
        ((40, 60), (16, 16), (16, 24)),
        ((40, 60), (24, 16), (24, 36)),
        ((37, 53), (16, 16), (16, 23)),
        ((10, 7), (16, 24), (34, 24)),
        ((16, 16), (16, 16), (16, 16)),
    ],
)
def test_the_picture_is_covered_and_cropped_at_the_place(original, size, covering, flipped):
    rough = RANDOM.integers(80, 176, (-(-original[0] // 4), -(-original[1] // 4), 3))
    values = np.kron(rough, np.ones((4, 4, 1)))[: original[0], : original[1]]
    whole = lanczos(lanczos(values, covering[0]).swapaxes(0, 1), covering[1]).swapaxes(0, 1).clip(0, 255)
    file = saved(Image.fromarray(values.astype(np.uint8)), "PNG")
    for crop_at in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.9)):
        pixels, found, (top, left) = decode(file, size, crop_at, flipped)
        assert found == original
        assert (top, left) == crop_of(original, size, crop_at, flipped)
        seen = whole[:, ::-1] if flipped else whole
        np.testing.assert_allclose(levels(pixels), seen[top : top + size[0], left : left + size[1]], atol=2)
        across = 1 - crop_at[1] if flipped else crop_at[1]
        assert abs(top - crop_at[0] * (covering[0] - size[0])) <= 0.5
        assert abs(left - across * (covering[1] - size[1])) <= 0.5


def test_a_picture_of_one_row_does_not_fill_the_memory():
    file = saved(Image.new("1", (3_000_000, 1), 1), "PNG")
    pixels, original, crop = decode(file, (64, 64))
    assert original == (1, 3_000_000)
    assert crop == (0, 96_000_000 - 32)
    assert torch.equal(pixels, torch.ones(3, 64, 64))


# Refused


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("WEBP", {}),
                                           ("WEBP", {"lossless": True}), ("BMP", {}), ("GIF", {})])  # fmt: skip
def test_a_cut_file_is_refused_or_lacks_no_pixel(kind, options):
    image = Image.fromarray(RANDOM.integers(0, 256, (24, 40, 3)).astype(np.uint8))
    file = saved(image, kind, **options)
    whole = decode(file, (24, 40))[0]
    accepted = []
    for end in range(len(file)):
        with contextlib.suppress(GazeError):
            accepted.append(decode(file[:end], (24, 40))[0])
    assert all(torch.equal(pixels, whole) for pixels in accepted)
    assert len(accepted) <= 20  # a checksum and an end mark behind the pixels


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"\x89PNG\r\n\x1a\n",
        bytes(range(256)) * 9,
        saved(Image.new("RGB", (9, 9)), "TIFF"),
    ],
)
def test_what_is_no_picture_is_refused_in_words_that_do_not_change(content):
    with pytest.raises(GazeError) as error:
        probe(content)
    assert "0x" not in str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_the_largest_picture():
    assert probe(saved(Image.new("1", (7999, 8000)), "PNG")) == (8000, 7999)
    with pytest.raises(GazeError, match=r"8000 x 8000 pixels are too many; the limit is 64 million"):
        probe(saved(Image.new("1", (8000, 8000)), "PNG"))


def test_bombs_are_refused_from_the_header(tmp_path):
    """In a process of its own, whose largest memory is measured."""
    script = """
import re, sys, warnings
from pathlib import Path
from tests.pictures import picture, saved
from diffusion.errors import GazeError
from train.data.decode import probe
def memory(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
    probe(saved(picture(0), kind))
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    try:
        probe(path.read_bytes())
    except GazeError as error:
        print(path.name, memory("VmHWM") - before, error.problem)
"""
    (tmp_path / "a.PNG").write_bytes(saved(Image.new("1", (8000, 8000)), "PNG"))
    small = png(np.zeros((1, 1, 1)), 8, GREY)
    (tmp_path / "b.PNG").write_bytes(small.replace(b"\0\0\0\x01\0\0\0\x01", b"\0\x01\0\0\0\x01\0\0"))
    gif = saved(picture(0), "GIF")
    (tmp_path / "c.GIF").write_bytes(gif[:6] + b"\xff\xff\xff\xff" + gif[10:])
    bmp = saved(picture(0), "BMP")
    (tmp_path / "d.BMP").write_bytes(bmp[:18] + b"\0\0\1\0" * 2 + bmp[26:])
    jpeg = saved(picture(0), "JPEG")
    at = jpeg.index(b"\xff\xc0")
    (tmp_path / "e.JPEG").write_bytes(jpeg[: at + 5] + b"\xff\xff\xff\xff" + jpeg[at + 9 :])
    webp = saved(Image.new("RGBA", (16, 16), (1, 2, 3, 4)), "WEBP", exif=b"Exif\0\0" + exif(1))
    at = webp.index(b"VP8X")
    (tmp_path / "f.WEBP").write_bytes(webp[: at + 12] + b"\xff\x3f\0\xff\x3f\0" + webp[at + 18 :])
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    assert len(rows) == len(list(tmp_path.iterdir()))
    for name, megabytes, problem in rows:
        assert float(megabytes) < 50, name
        assert "cannot be read" in problem


def test_colours():
    assert colour("white") == (255, 255, 255)
    assert colour("#0a141E") == (10, 20, 30)
    with pytest.raises(GazeError, match=r"'whit' is no colour.*\n.*'white'"):
        colour("whit")
