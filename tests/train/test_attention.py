"""Figures of attention while training: their closed forms, a loop in float64, and that looking changes nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.attention_sites import sites
from diffusion.errors import GazeError
from tests.train.test_validation import Together
from tests.train.tiny import newest_files, open_phase, run_here, tiny_recipe
from train import attention
from train.attention import attention_figures, overlaps
from train.config import Recipe
from train.report import write_report
from train.run import open_stream
from train.validation import evaluating, held_out_losses

NAMES = ("red", "circle", "<start>", "<end>", "<padding>")
OPTIONS = {"data": {"held_out": 0.3}, "validation": {"every": 40, "bins": 2, "pictures": 4}}
WATCHED = {**OPTIONS, "validation": {**OPTIONS["validation"], "attention": True}}


@pytest.fixture(scope="module")
def watched(data, vae, tmp_path_factory):
    """The run that is looked at, its phase with weights that tell words apart, and its held-out samples."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("watched"), data, vae, **WATCHED)
    stream, phase = open_phase(recipe)
    with torch.no_grad():
        for name, parameter in phase.module.named_parameters():
            if "attn2" in name:
                parameter *= 5
    return recipe, phase, open_stream(recipe, stream.source, "held_out")


# The figures


def test_maps_that_are_the_same_everywhere():
    found = attention_figures(torch.full((3, 5, 4, 6), 0.2), NAMES)
    assert found["attention_entropy"] == pytest.approx(math.log(24))
    assert found["attention_spread"] == pytest.approx(1)
    assert found["attention_overlap/neighbours"] == pytest.approx(1)
    assert "attention_overlap/others" not in found
    shares = {name: value for name, value in found.items() if "share" in name}
    assert shares == pytest.approx({"attention_share/words": 0.4, "attention_share/start": 0.2,
                                    "attention_share/end": 0.2, "attention_share/padding": 0.2})  # fmt: skip


def test_words_that_divide_the_picture():
    maps_BWHW = torch.zeros(1, 4, 4, 4)
    maps_BWHW[:, 0, :2] = maps_BWHW[:, 1, 2:] = 1.0
    maps_BWHW[:, 2] = 0.25  # as large as both, and half of it in each
    found = attention_figures(maps_BWHW, ("a", "b", "c", "<start>"))
    assert found["attention_entropy"] == pytest.approx((2 * math.log(8) + math.log(16)) / 3)
    assert found["attention_overlap/neighbours"] == pytest.approx((0 + 1 / 3) / 2, abs=1e-6)
    assert found["attention_overlap/others"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["attention_share/padding"] == 0


def test_what_a_caption_has_nothing_for_is_left_out():
    none = attention_figures(torch.full((1, 2, 2, 2), 0.5), ("<start>", "<end>"))
    assert none.keys() == {f"attention_share/{kind}" for kind in ("words", "start", "end", "padding")}
    pixel = attention_figures(torch.full((1, 3, 1, 1), 1 / 3), ("a", "<start>", "<end>"))
    assert pixel["attention_entropy"] == pytest.approx(0)
    assert "attention_spread" not in pixel


def test_overlap_is_intersection_over_union():
    maps_BWHW = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    maps_BWHW[0, 0] = 0  # of a word that nothing attends to
    found_BWW = overlaps(maps_BWHW)
    for picture in range(2):
        share_WN = [own / (own.sum() or 1) for own in maps_BWHW[picture].flatten(1)]
        for i, p_N in enumerate(share_WN):
            for j, q_N in enumerate(share_WN):
                both, either = torch.minimum(p_N, q_N).sum(), torch.maximum(p_N, q_N).sum()
                if p_N.sum() and q_N.sum():
                    torch.testing.assert_close(found_BWW[picture, i, j], both / either)
    assert found_BWW.isfinite().all()


# Where they come from


def test_a_phase_finds_what_a_loop_finds(watched):
    """From the inputs of each attention, in float64, token by token."""
    _, phase, held_out = watched
    seen = []

    def note(layer, arguments, out):
        seen.append((layer, layer.to_q(arguments[0]).double(), arguments[1][0].double()))

    places = {site.layer: site for site in sites(phase.model.unet, cross=True)}
    hooks = [layer.register_forward_hook(note) for layer in places]
    sample = held_out[0]
    with torch.no_grad():
        loss_B, found = phase.observe([sample] * 2, torch.tensor([0.3, 0.8], dtype=torch.float64))
        for hook in hooks:
            hook.remove()
        plain_B = phase.loss(phase.module, [sample] * 2, torch.tensor([0.3, 0.8], dtype=torch.float64))
    assert torch.equal(loss_B, plain_B)
    size, text = phase.latents.shape(sample.size)[1:], phase.model.text
    total_BSHW = 0
    for layer, q_BNC, k_BLSD in seen:
        heads = layer.heads
        for head, q_BND in enumerate(q_BNC.chunk(heads, dim=-1)):
            scores_BNS = q_BND @ k_BLSD[:, head].transpose(1, 2) / math.sqrt(q_BND.shape[-1])
            maps_BSHW = scores_BNS.softmax(-1).transpose(1, 2).unflatten(2, places[layer].size(*size))
            total_BSHW = total_BSHW + F.interpolate(maps_BSHW, size=size, mode="bilinear") / heads / len(seen)
    ids = text.tokenizer.split(sample.caption)[0]
    words = sample.caption.split()
    owner = [word for word in words for _ in text.tokenizer.split(word)[0]]
    assert len(owner) == len(ids)
    entropies, shares = [], 0.0
    for word in words:
        map_BHW = sum(total_BSHW[:, 1 + place] for place, name in enumerate(owner) if name == word)
        share_BN = (map_BHW / map_BHW.sum((1, 2), keepdim=True)).flatten(1)
        entropies.append(float(-(share_BN * share_BN.log()).sum(1).mean()))
        shares += float(map_BHW.mean())
    assert found["attention_entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert found["attention_spread"] < 0.999, "else the test would show little"
    assert found["attention_share/words"] == pytest.approx(shares, rel=1e-5)
    assert found["attention_share/start"] == pytest.approx(float(total_BSHW[:, 0].mean()), rel=1e-5)
    assert found["attention_share/end"] == pytest.approx(float(total_BSHW[:, 1 + len(ids)].mean()), rel=1e-5)
    assert sum(found[f"attention_share/{kind}"] for kind in ("words", "start", "end", "padding")) == pytest.approx(1)


def test_any_number_of_processes_finds_the_same_bits(watched):
    recipe, phase, held_out = watched
    with evaluating(phase.module):
        alone, *together = (
            Together(count).run(lambda processes: held_out_losses(recipe, phase, held_out, processes, lambda: False))
            for count in (1, 3)
        )
    assert together == [alone * 3]
    assert "attention_entropy" in alone[0]


def test_a_run_logs_and_reports_it_and_changes_no_bit(watched, data, vae, tmp_path):
    recipe = watched[0]
    run_here(recipe)
    run_here(tiny_recipe(tmp_path / "plain", data, vae, **OPTIONS))
    for name, content in newest_files(recipe.out).items():
        assert content == newest_files(tmp_path / "plain")[name]
    lines = [(folder / "metrics.jsonl").read_text() for folder in (recipe.out, tmp_path / "plain")]
    assert [text.count('"attention_spread"') for text in lines] == [2, 0]
    page = write_report(recipe.out).read_text()
    assert all(title in page for title in ("Spread of the words", "Overlap of words", "What attention goes to"))


def test_captions_are_read_as_they_are_trained_on(watched):
    """Brackets and BREAK are grammar in prompts only."""
    text = watched[1].model.text
    for caption in ("(red:1.5) BREAK [square]", "", "red blue " * 20, "a-b c's"):
        (chunk,) = text.plain(caption).chunks
        assert torch.tensor([text.tokenizer.framed(chunk.ids, text.window)]).equal(text.tokens([caption]))
    assert text.plain("red (blue").words == ("red", "(", "blue")
    assert text.plain("red blue " * 20).dropped.endswith("red blue")


# What cannot be looked at


@pytest.mark.parametrize("changes", [{"data": {"held_out": 0.0}}, {"phase": "text"}])
def test_it_needs_held_out_pictures_of_the_diffusion_phase(watched, changes):
    values = watched[0].model_dump(mode="json")
    values = {**values, **changes, "data": {**values["data"], **changes.get("data", {})}}
    values["validation"]["prompts"] = ["a red square"]
    with pytest.raises(ValueError, match=r"needs data\.held_out"):
        Recipe.model_validate(values)


def test_a_network_without_attention_to_words_is_named(watched, monkeypatch):
    monkeypatch.setattr(attention, "sites", lambda unet, cross: [])
    with pytest.raises(GazeError, match=r"validation\.attention .* has none"):
        open_phase(watched[0])
