import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion.errors import GazeError
from pipelines.images import to_pil, to_rgb, to_tensor
from pipelines.png import read_settings, save_png
from pipelines.sheet import grid


def is_not_a_pair(text: str) -> bool:
    return not any(0xD800 <= ord(a) < 0xDC00 <= ord(b) < 0xE000 for a, b in itertools.pairwise(text))


any_text = st.text(st.characters(blacklist_categories=()), max_size=40).filter(is_not_a_pair)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | any_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(any_text, any_json, max_size=4))
def test_settings_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, values: dict) -> None:
    path = tmp_path_factory.getbasetemp() / "round.png"
    save_png(Image.new("RGB", (2, 2)), path, values)
    assert read_settings(path) == values


@pytest.mark.parametrize(
    "prompt", ["", "a\0b", "\udc80", "\ud800", "👩🏽‍🚀 עברית", "line\nline\r\n", "x" * 100_000, "🍎" * 50_000]
)
def test_a_prompt_comes_back_as_it_was(tmp_path: Path, prompt: str) -> None:
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {"prompt": prompt, "seed": 0})
    assert read_settings(tmp_path / "a.png") == {"prompt": prompt, "seed": 0}


def test_a_surrogate_pair_comes_back_as_its_character(tmp_path: Path) -> None:
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {"prompt": "\ud83c\udf4e"})
    assert read_settings(tmp_path / "a.png") == {"prompt": "🍎"}


def test_settings_are_a_standard_text_chunk(tmp_path: Path) -> None:
    """Read by hand from the bytes: another program finds them before the pixels, under the keyword `gaze`."""
    save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {"prompt": "a red apple", "seed": 7})
    data, at, chunks = (tmp_path / "a.png").read_bytes(), 8, []
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + length
    kinds = [kind for kind, _ in chunks]
    assert dict(chunks)[b"tEXt"] == b'gaze\0{"prompt": "a red apple", "seed": 7}'
    assert kinds.index(b"tEXt") < kinds.index(b"IDAT")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_settings_that_are_not_json_are_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(GazeError, match=r"a\.png cannot be written as JSON"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "a.png", {"x": value})
    assert not list(tmp_path.iterdir())


def test_saving_fails_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none" / "a.png", tmp_path / "file" / "a.png"):
        with pytest.raises(GazeError, match="cannot be written"):
            save_png(Image.new("RGB", (2, 2)), path)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(GazeError, match="cannot be written"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_reading_settings_of_something_else(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    save_png(Image.new("RGB", (2, 2)), tmp_path / "whole.png", {"seed": 0})
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:30])
    (tmp_path / "text.png").write_text("<html>")
    (tmp_path / "list.png").write_bytes((tmp_path / "whole.png").read_bytes())
    save_png(Image.new("RGB", (2, 2)), tmp_path / "list.png", [])  # type: ignore[arg-type]
    for name in ("plain.png", "cut.png", "text.png", "list.png", "none.png"):
        with pytest.raises(GazeError, match=name):
            read_settings(tmp_path / name)


def test_pixels_round_trip_and_clamp() -> None:
    levels = torch.arange(256, dtype=torch.float64)
    pixels_BCHW = (levels / 127.5 - 1).float().reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    images = to_pil(pixels_BCHW)
    assert [image.size for image in images] == [(16, 16)] * 2
    np.testing.assert_array_equal(np.asarray(images[1])[:, :, 2].ravel(), np.arange(256))
    torch.testing.assert_close(to_tensor(images), pixels_BCHW, rtol=0, atol=1e-6)
    assert to_pil(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2))[0].getpixel((1, 0)) == (255,) * 3


def test_height_and_width_keep_their_places() -> None:
    pixels_BCHW = torch.full((1, 3, 2, 5), -1.0)
    pixels_BCHW[0, 0, 1, 4] = 1
    (image,) = to_pil(pixels_BCHW)
    assert image.size == (5, 2)
    assert image.getpixel((4, 1)) == (255, 0, 0)
    torch.testing.assert_close(to_tensor(image), pixels_BCHW)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_turns_the_picture_upright(tmp_path: Path, orientation: int) -> None:
    upright = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 14
    # How a camera stores an upright picture under each value (EXIF 2.3, table 6).
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(to_rgb(Image.open(tmp_path / "a.png"))), upright)


def test_other_modes_become_rgb() -> None:
    deep = Image.fromarray(np.array([[0, 257 * 10, 65535]], dtype=np.uint16))
    np.testing.assert_array_equal(np.asarray(to_rgb(deep))[0, :, 1], [0, 10, 255])
    clear = Image.new("RGBA", (1, 1), (200, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(clear, background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)
    palette = clear.convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("LA", (1, 1), (80, 255))).getpixel((0, 0)) == (80, 80, 80)
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 0, 0, 255))).getpixel((0, 0)) == (0, 0, 0)


def test_grid_places_pictures_row_by_row() -> None:
    colours = [(200, 10 * index, 5) for index in range(5)]
    sheet = grid([Image.new("RGB", (8, 4), colour) for colour in colours], columns=3)
    found = np.asarray(sheet).reshape(-1, 3)
    for colour in colours:
        assert (found == colour).all(1).sum() == 8 * 4
    places = [tuple(np.argwhere((np.asarray(sheet) == colour).all(2))[0]) for colour in colours]
    assert places == sorted(places)
    assert places[3][1] == places[0][1]


def test_labels_with_accents_are_drawn_without_what_the_font_lacks() -> None:
    images = [Image.new("RGB", (200, 20))]
    assert (
        grid(images, 1, ["une étoile à côté d'un cœur"]).tobytes()
        == grid(images, 1, ["une etoile a cote d'un coeur"]).tobytes()
    )


def test_grid_labels_take_room_below_and_odd_ones_are_drawn() -> None:
    images = [Image.new("RGB", (64, 64))] * 3
    labels = ["woman office worker: medium skin tone", "\0\ud800 😀\n", "x" * 300]
    bare, labelled = grid(images, 2), grid(images, 2, labels, scale=2)
    assert labelled.width > bare.width
    assert labelled.height > 2 * bare.height
    strip = np.asarray(labelled)[6 + 128 : 6 + 128 + 20, :128]
    assert strip.min() < 128


def test_a_long_label_takes_room_in_its_own_row_only() -> None:
    images = [Image.new("RGB", (64, 64))] * 6
    heights = [grid(images, 2, labels).height for labels in (["a"] * 6, ["a " * 200, *["a"] * 5], ["a " * 200] * 6)]
    assert heights[2] - heights[0] == 3 * (heights[1] - heights[0]) > 0


def test_letters_with_marks_are_drawn_without_them() -> None:
    """Pillow's own font would show a box."""
    image = Image.new("RGB", (64, 8))
    marked, plain = (
        grid([image], 1, [label]) for label in ("un café très sucré, ô Dvořák", "un cafe tres sucre, o Dvorak")
    )
    assert marked.tobytes() == plain.tobytes()


def test_grid_of_nothing_is_an_error() -> None:
    picture = Image.new("RGB", (8, 8))
    for arguments in (([], 2), ([picture], 0), ([picture], 1, ["a", "b"])):
        with pytest.raises(GazeError):
            grid(*arguments)
