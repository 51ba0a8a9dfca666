"""How benchmarks/truth.py measures: agreement, intervals, masks, captions with a word less; against closed forms."""

import math
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import agreement, truth
from benchmarks.agreement import KIND_OF, KINDS, Drawn, Instance, bootstrap, ious, mask_of, measure
from benchmarks.truth import inside_and_outside, without
from pipelines.shapes.captions import Word, words
from pipelines.shapes.judge import check, see
from pipelines.shapes.world import draw, masks, scene

SCENES = [scene(-5, index) for index in range(18)]


def test_intersection_over_union_at_each_share_of_the_largest_value():
    slope_HW = torch.arange(1, 11).repeat(10, 1) / 10  # columns of 0.1 to 1
    masks_IHW = torch.zeros(2, 10, 10, dtype=torch.bool)
    masks_IHW[0, :, 5:] = masks_IHW[1, :, :2] = True
    found_IK = ious(torch.stack([3 * slope_HW, slope_HW]), masks_IHW, torch.tensor([0.05, 0.55, 0.95]))
    torch.testing.assert_close(found_IK, torch.tensor([[0.5, 1.0, 0.2], [0.2, 0.0, 0.0]]))
    everywhere = ious(torch.ones(1, 10, 10), masks_IHW[:1], torch.tensor([0.9]))
    assert everywhere.item() == 0.5


def test_the_interval_of_a_mean_is_that_of_its_pictures():
    """Of 400 pictures with two equal words each the deviation is that of 400 values, not of 800."""
    generator = torch.Generator().manual_seed(1)
    values_P = torch.randn(400, generator=generator, dtype=torch.float64)
    values_I, pictures_I = values_P.repeat(2), torch.arange(400).repeat(2) + 7
    middle, low, high = bootstrap(values_I, torch.ones_like(values_I), pictures_I)
    reach = 1.96 * values_P.std().item() / math.sqrt(400)
    assert middle == pytest.approx(values_P.mean().item())
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=0.15 * reach)
    assert bootstrap(6 * torch.ones(5), 2 * torch.ones(5), torch.arange(5)) == pytest.approx((3, 3, 3))


def test_the_share_is_chosen_on_other_pictures():
    def instance(picture, width):
        mask_HW = torch.zeros(10, 10, dtype=torch.bool)
        mask_HW[:, :width] = True
        return Instance(picture, 0, "shape", mask_HW, {"map": torch.arange(10, 0, -1).repeat(10, 1) / 10})

    narrow, wide = ([instance(picture, width) for picture in range(3)] for width in (2, 8))
    found = measure(narrow, wide, "map")
    assert 0.8 < float(found.share) <= 0.9
    assert found.miou == pytest.approx((2 / 8,) * 3)
    assert measure(wide, wide, "map").miou == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("each", SCENES, ids=lambda each: each.name)
def test_words_have_the_masks_of_what_they_speak_of(each):
    seen, true_OHW = see(draw(each)), masks(each)
    for word in words(each):
        if word.text in KIND_OF:
            objects = list(word.objects or range(len(each.objects)))
            assert (mask_of(word, each.facts, seen) == true_OHW[objects].any(0)).mean() > 0.99
            assert mask_of(word, each.facts, seen[1:] if len(seen) == len(objects) else []) is None


def test_every_word_of_a_fact_is_known():
    assert {KIND_OF[word.text] for each in SCENES for word in words(each) if word.objects} <= {*KINDS}
    said = "two little violet crosses to the left of a hoop"
    assert [KIND_OF.get(word) for word in said.split(" ")] == [
        "count", "size", "colour", "shape", None, None, "relation", None, None, "shape",
    ]  # fmt: skip


def test_a_relation_speaks_of_both():
    each = next(each for each in SCENES if each.facts["relation"])
    both_HW = mask_of(Word("over", ()), each.facts, see(draw(each)))
    assert (both_HW == masks(each).any(0)).mean() > 0.99


def test_another_word_makes_the_true_picture_wrong():
    each = next(each for each in SCENES if each.facts["skill"] == "colour binding")
    said = [word.text for word in words(each)]
    for place, text in enumerate(said):
        if KIND_OF.get(text) in ("colour", "shape"):
            ways = dict(without(each, place))
            assert ways["removed"].split() == said[:place] + said[place + 1 :]
            kind, other = KIND_OF[text], ways["swapped"].split()[place]
            facts = {**each.facts, "objects": [dict(thing) for thing in each.facts["objects"]]}
            facts["objects"][words(each)[place].objects[0]][kind] = other
            assert check(facts, see(draw(each))) == [kind]


def test_change_inside_and_outside():
    change_IHW = torch.zeros(1, 4, 4)
    change_IHW[:, 0] = 3.0
    region_IHW = torch.zeros(1, 4, 4, dtype=torch.bool)
    region_IHW[:, :2] = True
    assert [float(value) for value in inside_and_outside(change_IHW, region_IHW)] == [1.5, 0]


def test_saliency_is_the_derivative_by_the_words_weight(pipe, monkeypatch):
    """Of a network that says the sum of the text's states, times x."""

    class Sum:
        def __init__(self, unet, schedule, condition):
            self.sums_B = condition.context_BSE.double().sum((1, 2))

        def __call__(self, x_BCHW, sigma):
            return x_BCHW * self.sums_B[:, None, None, None]

    monkeypatch.setattr(agreement, "Denoiser", Sum)
    text, prompts = pipe.model.text, ["a red dog", "big cat"]
    x_BCHW = torch.rand(2, 4, 3, 3, dtype=torch.float64)
    found = [Instance(row, word, "shape", None, {}) for row, word in ((0, 1), (1, 0))]
    drawn = Drawn(None, {}, [(x_BCHW, 1.0), (2 * x_BCHW, 0.5), (0 * x_BCHW, 0.1)], None)
    maps_IHW = agreement.saliency(pipe, prompts, [0, 1], found, drawn)
    states_BSE, _ = text.states(text.tokens([*prompts, ""]))
    for each, map_HW in zip(found, maps_IHW, strict=True):
        tokens = [1 + place for place, own in enumerate(text.plain(prompts[each.picture]).chunks[0].words)
                  if own == each.word]  # fmt: skip
        slope = (states_BSE[each.picture] - states_BSE[-1])[tokens].double().sum().abs()
        # Five are chosen of the three inputs: 0, 0, 1, 2 and 2.
        torch.testing.assert_close(map_HW, 4 * x_BCHW[each.picture].sum(0) * slope, rtol=1e-3, atol=1e-3)


def test_the_figure_is_an_svg_with_every_kind():
    course = {kind: {"1": 0.25, "2": 0.5} for kind in KINDS}
    layers = {kind: {"up_blocks.1.attentions.0.transformer_blocks.0.attn2": 0.5} for kind in KINDS}
    tree = ElementTree.fromstring(truth.plot(layers, course))
    said = [element.text for element in tree.iter() if element.text]
    assert {"up 1.0", *KINDS} <= {*said}
    assert truth.short("mid_block.attentions.0.transformer_blocks.2.attn2") == "mid 0.2"
