"""Latents and text states from the disk: the same bits as encoded anew, never stale, made again where damaged."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion.autoencoder import Autoencoder
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.errors import GazeError
from diffusion.text import TextEncoder
from tests.train.sources import Pictures, recipe_of
from tests.train.threads import together
from tests.train.tiny import AUTOENCODER, make_pictures, make_vae, newest_files, run_here, tiny_recipe
from train import store
from train.cache import Latents, TextStates
from train.data.folder import Folder
from train.data.look import look
from train.data.stream import Stream
from train.processes import Processes
from train.store import Store, as_keys, key_of
from train.tokenizer import learn_tokenizer

MIXED = [(16, 16), (20, 10), (10, 20), (16, 15), (12, 16), (30, 20)]
CAPTIONS = ["a red circle", "blue", "a green square and a red one", "(weighted:1.4)", "half \udcff", "red " * 20]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def autoencoder(seed: int = 0) -> Autoencoder:
    torch.manual_seed(seed)
    return Autoencoder.from_config(AUTOENCODER).eval().requires_grad_(False)


def latents(
    folder: Path, source: Pictures, cached: bool = True, model: Autoencoder | None = None, **data: object
) -> Latents:
    recipe = recipe_of(cache_latents=cached, cache=folder, **data)
    stream = Stream(source, recipe, with_pixels=not cached)
    return Latents(recipe, stream, Processes(), model or autoencoder())


def text_encoder(seed: int = 0, penultimate: bool = False) -> TextEncoder:
    torch.manual_seed(seed)
    tokenizer = learn_tokenizer(CAPTIONS[:3], 600, 12)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=12, **sizes)
    model = CLIPText(config, pooled=6 if penultimate else None).initialize()
    if penultimate:
        torch.nn.init.normal_(model.text_projection.weight)
    return TextEncoder(model.eval().requires_grad_(False), tokenizer, penultimate)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture
def encodings(monkeypatch):
    """How many pictures the autoencoder was given."""
    seen, encode = [], Autoencoder.encode
    monkeypatch.setattr(Autoencoder, "encode", lambda self, x: seen.extend(x) or encode(self, x))
    return seen


# Latents


@pytest.mark.parametrize("options", [{}, {"flip": 0.5}, {"bucket_step": 4, "flip": 0.5}, {"workers": 2}])
def test_cached_or_not_gives_the_same_bits(tmp_path, options):
    cached, anew = (latents(tmp_path, Pictures(MIXED), flag, **options) for flag in (True, False))
    assert cached.store is not None
    assert anew.store is None
    sizes = set()
    for positions in cached.stream.batches(0, 0, 1):
        batches = [[one.stream[position] for position in positions] for one in (cached, anew)]
        assert all(sample.pixels_CHW is None for sample in batches[0])
        assert [sample._replace(pixels_CHW=None) for sample in batches[1]] == batches[0]
        drawn = cached.draw(batches[0])
        assert drawn.dtype == torch.float32
        assert torch.equal(drawn, anew.draw(batches[1]))
        assert drawn.shape[1:] == cached.shape(batches[0][0].size)
        sizes.add(batches[0][0].size)
        if positions[0] > 80:
            break
    assert (len(sizes) > 1) == ("bucket_step" in options)


def test_a_draw_has_the_autoencoders_mean_and_deviation(tmp_path):
    found = latents(tmp_path, Pictures(MIXED[:1]))
    samples = [found.stream[position] for position in range(400)]
    mean, deviation = (value[0] for value in found.autoencoder.encode(found.stream.pixels(0, (16, 16))[None]))
    drawn = found.draw(samples)
    assert (drawn.mean(0) - mean).abs().max() < 5 * float(deviation.max()) / 20
    assert (drawn.std(0) / deviation - 1).abs().max() < 0.25
    assert torch.equal(found.draw(samples[5:7]), drawn[5:7])


def test_they_are_encoded_once_for_all_runs(tmp_path, encodings):
    latents(tmp_path, Pictures(MIXED))
    assert len(encodings) == len(MIXED)
    before = files(tmp_path)
    latents(tmp_path, Pictures(MIXED))
    latents(tmp_path, Pictures(MIXED[:4]), seed=5, caption_dropout=0.5)
    assert len(encodings) == len(MIXED)
    assert files(tmp_path) == before
    latents(tmp_path, Pictures(MIXED, repeats=[1] * 5 + [0]), flip=0.1)
    assert len(encodings) == len(MIXED) + 5, "only what is new: the mirrored ones of those that are used"


@pytest.mark.parametrize(
    "changes",
    [{"size": 32}, {"bucket_step": 4}, {"background": "black"}, {"model": autoencoder(1)}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_transform_or_autoencoder_is_another_item(tmp_path, encodings, changes):
    source = Pictures([(20, 10), (10, 20)])
    latents(tmp_path, source)
    found = latents(tmp_path, source, **changes)
    assert len(encodings) == 4
    samples = [found.stream[position] for position in range(8)]
    expected = latents(tmp_path, source, cached=False, **changes)
    assert torch.equal(found.draw(samples), expected.draw([expected.stream[position] for position in range(8)]))


def test_the_same_picture_twice_is_one_item(tmp_path, encodings):
    source = Pictures(MIXED)
    for index in (1, 2):
        source.edit(index, source.files[0])
    assert len(latents(tmp_path, source).store) == len(encodings) == 4


def test_an_edited_picture_never_gives_stale_latents(tmp_path):
    """1,000 edits: another picture in as many bytes, bytes that show nothing, another's content; no later times."""
    folder, count = tmp_path / "pictures", 1000
    folder.mkdir()
    for index in range(count):
        (folder / f"{index}.bmp").write_bytes(bmp(index))
    lines = (json.dumps({"file_name": f"{index}.bmp", "text": ""}) for index in range(count))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    small = {"block_out_channels": [4], "norm_num_groups": 2, "mid_block_add_attention": False}
    options = {"size": 2, "model": Autoencoder.from_config(small).eval().requires_grad_(False)}
    latents(tmp_path / "cache", look(Folder(folder), 0, Processes())[0], **options)
    for index in range(count):
        file = folder / f"{index}.bmp"
        times = file.stat()
        edits = bmp(count + index), bmp(index) + b"x", bmp((index + 7) % count)
        file.write_bytes(edits[index % 3])
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    edited = look(Folder(folder), 0, Processes())[0]
    found, anew = (latents(tmp_path / "cache", edited, flag, **options) for flag in (True, False))
    drawn, expected = (one.draw([one.stream[n] for n in range(count)]) for one in (found, anew))
    assert {found.stream[n].index for n in range(count)} == set(range(count))
    assert int((drawn != expected).any(dim=(1, 2, 3)).sum()) == 0


def bmp(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (number % 256, number // 256, 5)).save(file, "bmp")
    return file.getvalue()


def test_held_out_pictures_are_there_too(tmp_path):
    found = latents(tmp_path, Pictures(MIXED * 4), held_out=0.3)
    kept = Stream(found.stream.source, found.stream.recipe, "held_out", with_pixels=False)
    assert found.draw([kept[position] for position in range(len(kept))]).isfinite().all()


# The store


def items(count: int) -> tuple[np.ndarray, list[dict[str, torch.Tensor]]]:
    return as_keys(key_of(n) for n in range(count)), [{"value": torch.full((2,), float(n))} for n in range(count)]


def filled(folder: Path, count: int) -> tuple[Store, list[int]]:
    made: list[int] = []

    def make(numbers):
        for number in numbers:
            made.append(number)
            yield values[number]

    keys, values = items(count)
    found = Store(folder, Processes())
    found.fill(keys, make, "numbers", lambda number: 0)
    assert found.read(keys)["value"][:, 0].tolist() == list(range(count))
    return found, made


def test_files_hold_a_thousand_items_and_no_more_bytes_than_stated(tmp_path, monkeypatch):
    filled(tmp_path, 2500)
    assert sorted(len(load_file(path)["value"]) for path in tmp_path.iterdir()) == [500, 1000, 1000]
    monkeypatch.setattr(store, "BYTES", 80)
    filled(tmp_path / "small", 25)
    assert sorted(len(load_file(path)["value"]) for path in (tmp_path / "small").iterdir()) == [3, 11, 11]


def test_open_files_keep_no_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ITEMS", 1)
    before = len(os.listdir("/proc/self/fd"))
    found, _ = filled(tmp_path, 300)
    assert len(found) == 300
    assert len(os.listdir("/proc/self/fd")) <= before


def damage(kind: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if kind == "flipped":
        content[len(content) // 2] ^= 4
    path.write_bytes({"flipped": bytes(content), "cut": content[:-7], "empty": b"", "html": b"<html>"}[kind])


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "html", "gone"])
def test_a_damaged_file_is_found_and_made_again(tmp_path, kind):
    filled(tmp_path, 2500)
    before = files(tmp_path)
    victim = next(path for path, content in before.items() if len(content) < 20_000)
    if kind == "gone":
        victim.unlink()
        made = filled(tmp_path, 2500)[1]
    else:
        damage(kind, victim)
        with pytest.warns(UserWarning, match=f"{victim.name} is damaged"):
            made = filled(tmp_path, 2500)[1]
    assert len(made) == 500
    assert files(tmp_path) == before


def test_a_stop_on_the_way_keeps_what_was_written(tmp_path):
    keys, values = items(2500)

    def stopped(numbers):
        for number in numbers:
            if number == 2200:
                raise KeyboardInterrupt
            yield values[number]

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, Processes()).fill(keys, stopped, "numbers", lambda number: 0)
    assert len(Store(tmp_path, Processes())) == 2000
    assert len(filled(tmp_path, 2500)[1]) == 500


def test_what_a_kill_left_half_written_goes_after_an_hour(tmp_path):
    for name, age in (("new", 0), ("old", 4000)):
        (tmp_path / f".{name}").touch()
        os.utime(tmp_path / f".{name}", (os.stat(tmp_path).st_mtime - age,) * 2)
    filled(tmp_path, 3)
    assert [path.name for path in tmp_path.glob(".*")] == [".new"]


def test_a_full_disk_is_named_with_what_is_needed_and_free(tmp_path, monkeypatch):
    filled(tmp_path, 1000)
    usage = shutil.disk_usage(tmp_path)._replace(free=1234)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        GazeError, match=rf"{tmp_path} cannot be written: no space.* takes \d+ bytes, 1234 are free"
    ) as error:
        filled(tmp_path, 4000)
    assert "data.cache=DIR" in error.value.hint
    assert len(files(tmp_path)) == 1
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(GazeError, match="No space left on device"):
        filled(tmp_path, 1500)
    monkeypatch.undo()
    assert len(filled(tmp_path, 1500)[1]) == 500


def test_processes_share_the_work_and_a_failure(tmp_path):
    keys, values = items(100)

    def work(processes, failing):
        own, made = Store(tmp_path, processes), []

        def make(numbers):
            for number in numbers:
                if number == failing:
                    raise GazeError("picture 50 has changed", "put it back")
                made.append(number)
                yield values[number]

        try:
            own.fill(keys, make, "numbers", lambda number: 0)
        except GazeError as error:
            return error.problem
        return made, own.read(keys)["value"][:, 0].tolist()

    assert together(3, lambda processes: work(processes, 50)) == ["picture 50 has changed"] * 3
    found = together(3, lambda processes: work(processes, None))
    assert all(values == list(range(100)) for _, values in found)
    assert {len(made) for made, _ in found} <= {11, 12}, "a third of what the first attempt did not write"


# Text


@pytest.mark.parametrize("penultimate", [False, True])
def test_states_of_captions_cached_or_not_are_the_same_bits(tmp_path, penultimate):
    texts = [text_encoder(0, penultimate)] * (2 if penultimate else 1)
    cached, anew = (
        TextStates(recipe_of(cache=tmp_path, cache_text=flag), CAPTIONS, Processes(), texts) for flag in (True, False)
    )
    assert (cached.store is None, anew.store is None) == (False, True)
    asked = ["", *CAPTIONS, "blue", ""]
    one, other = cached.states(asked), anew.states(asked)
    assert one.context_BSE.shape == (9, 12, 16 if penultimate else 8)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    assert one.length_B.tolist()[:3] == [2, 5, 3]
    assert one.length_B.max() == 12
    # As the pipelines read prompts without weights.
    expected = texts[0].encode(["a red circle"])
    torch.testing.assert_close(one.context_BSE[1:2, :, :8], expected.context_BSE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.pooled_BP[1:2], expected.vector_BV, rtol=1e-5, atol=1e-6)


def test_states_are_of_the_encoder_and_the_caption(tmp_path):
    for seed in (0, 1, 0):
        recipe = recipe_of(cache=tmp_path)
        found = TextStates(recipe, CAPTIONS[:2], Processes(), [text_encoder(seed)]).states(["blue"])
        expected = TextStates(recipe_of(cache_text=False), (), Processes(), [text_encoder(seed)]).states(["blue"])
        assert torch.equal(found.context_BSE, expected.context_BSE)
    assert len(files(tmp_path)) == 2
    TextStates(recipe, CAPTIONS[:3], Processes(), [text_encoder(1)])
    assert len(files(tmp_path)) == 3


# In a run


def test_a_run_over_a_cache_that_is_there_gives_the_same_bits(tmp_path):
    """Fresh weights do not depend on what was encoded before them."""
    pictures, vae = make_pictures(tmp_path / "pictures"), make_vae(tmp_path / "vae")
    found = []
    for name in ("first", "second"):
        recipe = tiny_recipe(tmp_path / name, pictures, vae, pictures=16, data={"cache": tmp_path / "cache"})
        run_here(recipe)
        assert not (recipe.out / "cache").exists()
        found.append(newest_files(recipe.out))
    assert found[0]["model-00000.safetensors"] == found[1]["model-00000.safetensors"]


@pytest.mark.parametrize("options, says", [({"size": 15}, "data.size 15"), ({"bucket_step": 1}, "data.bucket_step 1")])
def test_a_size_that_the_factor_does_not_divide_is_refused(tmp_path, options, says):
    with pytest.raises(GazeError, match=rf"{says} does not divide by 2") as error:
        latents(tmp_path, Pictures(MIXED), **options)
    assert error.value.hint in ("data.size=16", "data.bucket_step=2")
