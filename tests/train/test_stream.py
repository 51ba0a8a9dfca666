"""Samples as a function of (seed, n): buckets, captions, crops, mirroring, held-out pictures, processes and workers."""

import io
import tracemalloc
from collections import Counter
from itertools import islice
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from diffusion.errors import GazeError
from tests.train.sources import Pictures, recipe_of
from tests.train.tiny import PROCESSES
from train.data.buckets import Shapes, held_out, sizes
from train.data.source import Record
from train.data.stream import Stream

MIXED = [(16, 16), (20, 10), (10, 20), (16, 15), (40, 10), (7, 8), (12, 16), (16, 12), (9, 9), (30, 20), (20, 30)]


def stream(
    shapes=((16, 16),) * 20, part="train", with_pixels=False, accumulation=1, batch_size=8, seed=0, data=None, **source
):
    pictures = Pictures(shapes, content=with_pixels, **source)
    return Stream(pictures, recipe_of(batch_size, accumulation, seed, **(data or {})), part, with_pixels)


def global_batches(data: Stream, count: int) -> list[list]:
    size = data.recipe.batch_size
    return [[data[position] for position in range(size * batch, size * batch + size)] for batch in range(count)]


# Buckets


@pytest.mark.parametrize("size, step, longest", [(512, 64, 2.0), (256, 64, 3.0), (64, 8, 1.0), (16, 4, 9.0)])
def test_the_sizes_are_all_those_that_fit(size, step, longest):
    sides = range(step, size * size // step + 1, step)
    fitting = [(h, w) for h in sides for w in sides if h * w <= size * size and max(h, w) <= longest * min(h, w)]
    found = sizes(size, step, longest)
    assert (size, size) in found
    assert found == sorted(found)
    assert {(w, h) for h, w in found} == set(found)
    for h, w in found:
        assert (h, w) in fitting
        assert (h + step) * w > size * size < h * (w + step), "no side can grow"
    for h, w in fitting:
        grown = [(a, b) for a in sides for b in sides if a >= h and b >= w and a * b <= size * size]
        assert set(grown) & set(found) or max(max(a, b) / min(a, b) for a, b in grown) > longest


@given(height=st.integers(1, 4000), width=st.integers(1, 4000))
@settings(max_examples=200, deadline=None)
def test_a_picture_gets_the_nearest_size(height, width):
    shapes = Shapes(recipe_of(size=64, bucket_step=8, longest=3.0).data)

    def distance(size):
        return abs(log(size[0] / size[1]) - log(height / width))

    found = shapes.sizes[shapes.nearest(Record("", ("",), "", height, width))]
    assert distance(found) <= min(map(distance, shapes.sizes)) + 1e-12


def test_longest_bounds_the_sizes():
    for longest, expected in ((1.5, {(16, 16)}), (2.0, {(16, 16), (12, 20), (20, 12)})):
        data = stream([(64, 8), (8, 64), (16, 16)], data={"bucket_step": 4, "longest": longest})
        assert {data[position].size for position in range(48)} == expected


@given(
    shapes=st.lists(st.sampled_from(MIXED), min_size=1, max_size=40),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 9),
    window=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_a_global_batch_has_one_size_and_every_picture_its_turn(shapes, batch_size, seed, window):
    """After e epochs a bucket of c visits has had floor(e * c / batch_size) batches, which go through its pictures."""
    repeats = [1 + n % 3 for n in range(len(shapes))]
    blocks = [len(shapes) // 2, 0, len(shapes) - len(shapes) // 2]
    options = {"bucket_step": 4, "longest": 4.0, "window": window}
    data = stream(shapes, batch_size=batch_size, seed=seed, repeats=repeats, blocks=blocks, data=options)
    visits: Counter = Counter()
    for index, times in enumerate(repeats):
        visits[data.size_of(index)] += times
    assert len(data) == sum(repeats)
    for epochs in (1, 3):
        due = {size: epochs * count // batch_size for size, count in visits.items()}
        batches = global_batches(data, sum(due.values()))
        assert all(len({sample.size for sample in batch}) == 1 for batch in batches)
        assert Counter(batch[0].size for batch in batches) == {size: count for size, count in due.items() if count}
        seen = Counter(sample.index for batch in batches for sample in batch)
        for index, times in enumerate(repeats):
            whole, rest = divmod(due[data.size_of(index)] * batch_size, visits[data.size_of(index)])
            assert whole * times <= seen[index] <= (whole + (rest > 0)) * times


def test_without_buckets_a_sample_does_not_depend_on_the_batch_size():
    one, other = (stream(MIXED, batch_size=size) for size in (3, 8))
    assert [one[n] for n in range(100)] == [other[n] for n in range(100)]
    assert {one[n].size for n in range(100)} == {(16, 16)}
    bucketed = stream(MIXED, data={"bucket_step": 4})
    assert {bucketed[n].size for n in range(100)} > {(16, 16)}


def test_a_size_that_the_step_does_not_divide_is_refused():
    with pytest.raises(GazeError, match=r"no multiple of data\.bucket_step 5") as error:
        stream(data={"bucket_step": 5})
    assert error.value.hint == "data.size=20"


def test_pictures_that_all_count_once_take_no_memory():
    class Alike(Pictures):
        def __len__(self):
            return 200_000

        def __getitem__(self, index):
            return self.records[0]

    source = Alike([(16, 16)], blocks=[200_000])
    tracemalloc.start()
    data = Stream(source, recipe_of(), with_pixels=False)
    assert len({data[position].index for position in range(100)}) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


# What a visit is


def test_a_sample_is_a_function_of_seed_and_position():
    options = {"caption_dropout": 0.3, "flip": 0.5, "crop": "random", "bucket_step": 4}
    ahead, again, other = (stream(MIXED, captions=3, seed=seed, data=options) for seed in (0, 0, 1))
    forwards = [ahead[position] for position in range(60)]
    assert [again[position] for position in reversed(range(60))][::-1] == forwards
    assert [sample.position for sample in forwards] == list(range(60))
    for field in ("index", "caption", "dropped", "flipped", "crop"):
        assert [getattr(other[n], field) for n in range(60)] != [getattr(sample, field) for sample in forwards]


def test_captions_are_dropped_and_chosen_anew_at_every_visit():
    data = stream([(16, 16)] * 4, captions=2, data={"caption_dropout": 0.25})
    samples = [data[position] for position in range(4000)]
    assert all((sample.caption == "") == sample.dropped for sample in samples)
    share = np.mean([sample.dropped for sample in samples])
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    for index in range(4):
        visits = Counter(sample.caption for sample in samples if sample.index == index)
        assert set(visits) == {"", f"{index} 0", f"{index} 1"}
        assert abs(visits[f"{index} 0"] - visits[f"{index} 1"]) < 4 * 750**0.5
    never, always = (stream(data={"caption_dropout": share}) for share in (0.0, 1.0))
    assert not any(never[n].dropped for n in range(100))
    assert all(always[n].dropped for n in range(100))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_that_is_asked_for_is_mirrored(share):
    data = stream(with_pixels=True, data={"flip": share})
    samples = [data[position] for position in range(200)]
    assert abs(np.mean([sample.flipped for sample in samples]) - share) <= 4 * (share * (1 - share) / 200) ** 0.5
    for sample in samples[:10]:
        straight = data.pixels(sample.index, sample.size)
        assert torch.equal(sample.pixels_CHW, straight.flip(-1) if sample.flipped else straight)


def test_the_crop_is_where_the_sample_says():
    """A picture whose rows and columns number themselves, at its own scale."""
    levels = np.zeros((16, 50, 3), np.uint8)
    levels[:, :, 0] = np.arange(50) * 5
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "png")
    found = {}
    for crop in ("center", "random"):
        pictures = Pictures([(16, 50)])
        pictures.edit(0, file.getvalue())
        data = Stream(pictures, recipe_of(crop=crop, flip=0.5))
        lefts = set()
        for sample in map(data.__getitem__, range(40)):
            assert (sample.original, sample.size) == ((16, 50), (16, 16))
            columns = ((sample.pixels_CHW[0, 0] + 1) * 127.5 / 5).tolist()
            first = 49 - columns[0] if sample.flipped else columns[0]
            assert sample.crop == (0, pytest.approx(first, abs=1.01))
            lefts.add(sample.crop[1])
        found[crop] = lefts
    assert found["center"] == {17}
    assert len(found["random"]) > 12
    assert (min(found["random"]) < 5, max(found["random"]) > 29) == (True, True)


def test_transparency_lies_on_the_background():
    file = io.BytesIO()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(file, "png")
    for name, colour in {"white": (1, 1, 1), "#ff0000": (1, -1, -1)}.items():
        pictures = Pictures([(16, 16)])
        pictures.edit(0, file.getvalue())
        assert Stream(pictures, recipe_of(background=name))[0].pixels_CHW[:, 0, 0].tolist() == list(colour)
    with pytest.raises(GazeError, match="'whit' is no colour"):
        stream(data={"background": "whit"})


def test_a_picture_that_changed_is_named():
    pictures = Pictures([(16, 16)])
    data = Stream(pictures, recipe_of())
    assert data[0].pixels_CHW is not None
    pictures.files[0] = pictures.files[0][:50]
    with pytest.raises(GazeError, match=r"0\.png has changed since the run began"):
        data[0]
    assert Stream(pictures, recipe_of(), with_pixels=False)[0].pixels_CHW is None


def test_no_picture_at_all_is_refused():
    with pytest.raises(GazeError, match="repeats 0"):
        stream([(16, 16)] * 2, repeats=[0, 0])


# Held out


def test_the_parts_share_the_pictures_by_their_content():
    shapes, repeats = [(16, 16)] * 400, [n % 3 for n in range(400)]
    train, kept = (stream(shapes, part, repeats=repeats, data={"held_out": 0.2}) for part in ("train", "held_out"))
    seen = Counter(train[n].index for n in range(len(train)))
    held = Counter(kept[n].index for n in range(len(kept)))
    assert seen.keys() | held.keys() == {n for n in range(400) if repeats[n]}
    assert not seen.keys() & held.keys()
    assert all(seen[index] == repeats[index] for index in seen)
    assert set(held.values()) == {1}
    assert abs(len(held) / 267 - 0.2) < 4 * (0.16 / 267) ** 0.5
    # A picture is of the same part in another set, under another seed and place.
    fewer = stream(shapes[:100], "held_out", repeats=repeats[:100], seed=5, data={"held_out": 0.2})
    assert {fewer[n].index for n in range(len(fewer))} == {index for index in held if index < 100}
    assert all(held_out(record.key, 0.5) for record in train.source.records if held_out(record.key, 0.2))


def test_held_out_pictures_are_shown_as_they_are():
    options = {"held_out": 0.5, "caption_dropout": 0.9, "flip": 0.9, "crop": "random", "bucket_step": 4}
    kept = stream(MIXED * 3, "held_out", data=options)
    samples = [kept[n] for n in range(len(kept))]
    assert len({sample.index for sample in samples}) == len(kept)
    assert not any(sample.dropped or sample.flipped for sample in samples)
    for sample in samples:
        scale = max(sample.size[0] / sample.original[0], sample.size[1] / sample.original[1])
        for side in (0, 1):
            assert sample.crop[side] == pytest.approx((sample.original[side] * scale - sample.size[side]) / 2, abs=1)
    assert len({sample.size for sample in samples}) > 1


@pytest.mark.parametrize(
    "part, share, says", [("held_out", 0.0, "holds no picture back"), ("train", 0.999, "leaves no")]
)
def test_an_empty_part_is_refused(part, share, says):
    with pytest.raises(GazeError, match=says):
        stream([(16, 16)], part, data={"held_out": share})


# Processes and workers


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("start", [0, 24, 36])
def test_processes_share_one_stream(processes, accumulation, start):
    """Uneven data and an empty shard: 19 pictures, batches of 12."""
    data = stream([(16, 16)] * 19, batch_size=12, accumulation=accumulation, blocks=[10, 0, 9])
    ranks = [data.batches(start, rank, processes) for rank in range(processes)]
    for first in range(start, start + 48, 12 // accumulation):
        parts = [next(rank) for rank in ranks]
        assert len({len(part) for part in parts}) == 1
        assert [n for row in zip(*parts, strict=True) for n in row] == list(range(first, first + 12 // accumulation))


def test_a_batch_that_does_not_divide_is_refused_at_once():
    with pytest.raises(GazeError, match=r"2 processes x 3.*\n.*batch_size=12"):
        stream(batch_size=10, accumulation=3).batches(0, 0, 2)


@pytest.mark.parametrize("workers, method", [(0, None), (2, "fork"), (1, PROCESSES)])
def test_workers_do_not_change_the_stream(workers, method):
    options = {"flip": 0.5, "crop": "random", "bucket_step": 4, "caption_dropout": 0.2}
    data = stream(MIXED, with_pixels=True, captions=2, data=options)
    loader = DataLoader(
        data,
        batch_sampler=data.batches(16, 0, 1),
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context=method,
    )
    for start, batch in zip(range(16, 56, 8), islice(loader, 5), strict=True):
        for sample, position in zip(batch, range(start, start + 8), strict=True):
            expected = data[position]
            assert sample._replace(pixels_CHW=None) == expected._replace(pixels_CHW=None)
            assert torch.equal(sample.pixels_CHW, expected.pixels_CHW)
