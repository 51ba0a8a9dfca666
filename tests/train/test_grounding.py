"""The loss of attention beside masks: its formula, masks that follow their pictures, runs that go on to the bit."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.attention_sites import Site
from diffusion.errors import GazeError
from tests.train.tiny import newest_files, open_phase, run_here, run_one_step, tiny_recipe
from train.attention import weighed
from train.config import Recipe
from train.data.masks import Masks
from train.grounding import grounding_loss

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def make_masked(folder, count=12, height=16, width=24):
    """A red and a blue square on white, of which the masks know the pixels; every fourth picture has no masks."""
    (folder / "masks").mkdir(parents=True)
    rows = []
    for index in range(count):
        random = np.random.default_rng(index)
        pixels, levels = np.full((height, width, 3), 255, np.uint8), np.zeros((height, width), np.uint8)
        for number, colour in enumerate((RED, BLUE)):
            top, left = random.integers(0, height - 6), random.integers(0, width // 2 - 6) + number * width // 2
            pixels[top : top + 6, left : left + 6] = colour
            levels[top : top + 6, left : left + 6] = number + 1
        name = f"{index}.png"
        Image.fromarray(pixels).save(folder / name)
        Image.fromarray(levels).save(folder / "masks" / name)
        said = [("red", [0]), ("and", []), ("blue", [1]), ("squares", [0, 1])]
        row = {"file_name": name, "text": " ".join(text for text, _ in said)}
        marked = {"masks": f"masks/{name}", "words": [{"text": text, "objects": of} for text, of in said]}
        rows.append(row | (marked if index % 4 else {}))
    write(folder, rows)
    return folder


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return make_masked(tmp_path_factory.mktemp("masked") / "pictures")


@pytest.fixture
def make(masked, vae, tmp_path):
    """A recipe with a grounding loss."""

    def make(grounding=0.5, **changes):
        text = {"text": {"vocab_size": 530, "window": 12}}
        return tiny_recipe(tmp_path / "run", masked, vae,
                           **{"model": text, "objective": {"grounding": grounding}, **changes})  # fmt: skip

    return make


def test_loss_and_gradient_are_those_of_a_loop():
    """Two pictures of two words each, of which one has no mask; attentions at two levels of latents of 4x5."""
    random = torch.Generator().manual_seed(0)
    of_BS = torch.tensor([[-1, 0, 0, 1, -1], [-1, 0, 1, 5, -1]])
    masks_BWHW = (torch.rand(2, 2, 4, 5, generator=random, dtype=torch.float64) - 0.3).clamp(min=0)
    masks_BWHW[1, 1] = 0
    levels = (0, 1)
    sizes = [Site("", True, level, None).size(4, 5) for level in levels]
    scores = [torch.randn(2, h * w, 5, generator=random, dtype=torch.float64, requires_grad=True) for h, w in sizes]

    def loss(*scores):
        places = [Site("", True, level, None) for level in levels]
        weights = [(place, score.softmax(-1)) for place, score in zip(places, scores, strict=True)]
        return grounding_loss(weights, of_BS, masks_BWHW)

    found_B = loss(*scores)
    for picture, words in enumerate(([0, 1], [0])):
        total = 0.0
        for (height, width), score in zip(sizes, scores, strict=True):
            weights_NS = score[picture].softmax(-1)
            for word in words:
                cover, looked = [], []
                for y in range(height):
                    for x in range(width):
                        rows = slice(y * 4 // height, -(-(y + 1) * 4 // height))
                        columns = slice(x * 5 // width, -(-(x + 1) * 5 // width))
                        cover.append(float(masks_BWHW[picture, word, rows, columns].mean()))
                        own = [weights_NS[y * width + x, s].item() for s in range(5) if of_BS[picture, s] == word]
                        looked.append(sum(own))
                for mask, seen in zip(cover, looked, strict=True):
                    aim = mask / sum(cover)
                    total += aim * math.log(aim * sum(looked) / seen) if aim else 0
        assert found_B[picture].item() == pytest.approx(total / len(levels) / len(words), rel=1e-12)
    assert torch.autograd.gradcheck(loss, scores)


@pytest.mark.parametrize(
    "map_N, loss",
    [([0.2, 0.2, 0, 0], 0), ([0.7] * 4, math.log(2)), ([0.9, 0.3, 0, 0], -math.log(0.75) / 2)],
    ids=["fills the mask", "everywhere", "inside, unevenly"],
)
def test_only_attention_that_fills_the_mask_costs_nothing(map_N, loss):
    site = Site("", True, 0, None)
    masks_BWHW = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    weights = [(site, torch.tensor(map_N)[None, :, None])]
    assert grounding_loss(weights, torch.tensor([[0]]), masks_BWHW).item() == pytest.approx(loss, abs=1e-6)
    assert grounding_loss(weights, torch.tensor([[-1]]), masks_BWHW).item() > 20  # of a word that nothing looks at
    assert grounding_loss(weights, torch.tensor([[-1]]), 0 * masks_BWHW).item() == 0


def test_it_is_added_to_the_loss_as_often_as_the_recipe_says(make):
    stream, without = open_phase(make(grounding=0.0, data={"caption_dropout": 0.3}))
    samples = [stream[n] for n in range(12)]
    plain_B = without.loss(without.module, samples)
    losses = {}
    for grounding in (0.5, 2.0):
        _, phase = open_phase(make(grounding=grounding, data={"caption_dropout": 0.3}))
        with weighed(phase.model.unet) as weights:
            both_B = phase.loss(phase.module, samples)
        losses[grounding] = phase.grounding.loss(weights, samples, (8, 8))
        torch.testing.assert_close(both_B - plain_B, grounding * losses[grounding])
    assert torch.equal(losses[0.5], losses[2.0])
    marked = [not sample.dropped and bool(sample.index % 4) for sample in samples]
    assert [bool(value) for value in losses[0.5] > 0.1] == marked
    assert 2 < sum(marked) < 10
    both_B.sum().backward()
    plain_B.sum().backward()
    for trained, changes in ((phase, True), (without, False)):  # whose residual branches still end in zeros
        gradients = [weight.grad for name, weight in trained.module.named_parameters() if "attn2.to_k" in name]
        assert gradients
        assert all(bool(gradient.any()) == changes for gradient in gradients)


def test_the_loss_of_a_sample_does_not_depend_on_who_shares_its_batch(make):
    stream, phase = open_phase(make())
    samples = [stream[n] for n in range(6)]
    together_B = phase.loss(phase.module, samples)
    alone_B = torch.cat([phase.loss(phase.module, [sample]) for sample in samples])
    torch.testing.assert_close(together_B, alone_B)
    u_B = torch.full((6,), 0.4, dtype=torch.float64)
    _, without = open_phase(make(grounding=0.0))
    assert torch.equal(phase.loss(phase.module, samples, u_B), without.loss(without.module, samples, u_B))


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_masks_are_cut_and_mirrored_as_their_pictures(make, masked, flip):
    """Pictures of 16 x 24 become samples of 16 x 16, one pixel a pixel, so the masks are where the colours are."""
    stream, phase = open_phase(make(data={"crop": "random", "cache_latents": False, "flip": flip}))
    samples = [sample for sample in map(stream.__getitem__, range(30)) if sample.index % 4]
    assert len({sample.crop for sample in samples}) > 3
    for sample in samples:
        found_OHW = phase.grounding.masks.covered(f"{sample.index}.png", sample, (16, 16))
        red_HW, blue_HW = (sample.pixels_CHW[number] < 0 for number in (2, 0))
        assert torch.equal(found_OHW, torch.stack([red_HW, blue_HW]).float())
        half_OHW = phase.grounding.masks.covered(f"{sample.index}.png", sample, (8, 8))
        torch.testing.assert_close(half_OHW, torch.nn.functional.avg_pool2d(found_OHW, 2), atol=0.005, rtol=0)


def test_words_have_the_masks_of_their_objects_as_far_as_they_have_tokens(make):
    stream, phase = open_phase(make(data={"caption_dropout": 0.0}))
    (sample,) = [sample for sample in map(stream.__getitem__, range(12)) if sample.index == 1]
    of_BS, masks_BWHW = phase.grounding.targets([sample], (8, 8))
    red, none, blue, both = masks_BWHW[0]
    assert torch.equal(red + blue, both)
    assert not none.any()
    ids = phase.model.text.tokenizer.split(sample.caption)[0]
    assert of_BS[0, 0] == of_BS[0, 1 + len(ids)] == -1
    assert sorted({*of_BS[0].tolist()}) == [-1, 0, 1, 2, 3]
    phase.model.text.window = 4  # start, two tokens, end
    of_BS, masks_BWHW = phase.grounding.targets([sample], (8, 8))
    assert not masks_BWHW[0, 2:].any()


def test_each_caption_of_a_picture_has_words_of_its_own(make, tmp_path):
    rows = read(make_masked(tmp_path / "own"))
    for row in rows:
        if "words" in row:
            row["text"] = [row["text"], "blue squares and red"]
            row["words"] = [row["words"], [row["words"][i] for i in (2, 3, 1, 0)]]
    write(tmp_path / "own", rows)
    stream, phase = open_phase(make(data={"caption_dropout": 0.0, "folder": tmp_path / "own"}))
    found = {}
    for sample in map(stream.__getitem__, range(240)):
        if sample.index == 1:
            found[sample.caption] = phase.grounding.targets([sample], (8, 8))[1][0]
    first, second = found["red and blue squares"], found["blue squares and red"]
    assert torch.equal(first[[2, 3, 1, 0]], second)
    assert not torch.equal(first[0], first[2])


def test_a_stopped_run_goes_on_to_the_bit_and_not_with_other_masks(make, vae, tmp_path):
    pictures = make_masked(tmp_path / "own")
    options = {"pictures": 32, "data": {"folder": pictures}}
    straight = make(out=tmp_path / "straight", **options)
    run_here(straight)
    again = make(out=tmp_path / "again", **options)
    run_one_step(again)
    run_here(again)
    assert newest_files(again.out) == newest_files(straight.out)
    run_one_step(make(out=tmp_path / "third", **options))
    mask = pictures / "masks" / "1.png"
    Image.new("L", (24, 16), 1).save(mask)
    with pytest.raises(GazeError):
        run_here(make(out=tmp_path / "third", **options))


# What cannot work


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda row: row.pop("words"), "line 2: masks without their words"),
        (lambda row: row["words"].pop(), "line 2: the caption is 'red and blue squares', but its words are"),
        (lambda row: row.update(masks="masks/none.png"), "line 2: there are no masks 'masks/none.png'"),
        (lambda row: row.update(masks="../1.png"), "line 2: there are no masks"),
        (lambda row: row["words"][0].update(objects=[-1]), "line 2: an object's number"),
        (lambda row: row["words"][0].update(objects=0), "line 2: masks without their words"),
        (lambda row: row.update(text=[row["text"]]), "line 2: masks without their words"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, says):
    rows = read(make_masked(tmp_path / "own", count=2))
    change(rows[1])
    write(tmp_path / "own", rows)
    with pytest.raises(GazeError) as error:
        Masks(tmp_path / "own")
    assert says in error.value.problem


def test_masks_that_are_not_there_or_of_another_size_are_named(make, masked, tmp_path):
    rows = read(make_masked(tmp_path / "own", count=1))
    write(tmp_path / "own", rows)
    with pytest.raises(GazeError, match="names masks"):
        Masks(tmp_path / "own")
    with pytest.raises(GazeError, match="cannot be read"):
        Masks(tmp_path)
    stream, phase = open_phase(make())
    (sample,) = [sample for sample in map(stream.__getitem__, range(12)) if sample.index == 1]
    with pytest.raises(GazeError, match="has 24 x 16 pixels, its picture has 24 x 17"):
        phase.grounding.masks.covered("1.png", sample._replace(original=(17, 24)), (8, 8))


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"gradient_checkpointing": True}, "which gradient_checkpointing does not keep"),
        ({"compile": True}, "which compile does not keep"),
        ({"data": {"folder": None, "drawn": 5}}, "with the masks of a data.folder"),
        ({"phase": "text"}, "is of phase diffusion"),
    ],
)
def test_what_does_not_go_together_is_refused(make, changes, says):
    values = make().model_dump(mode="json")
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({**values, **changes})
