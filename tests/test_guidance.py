"""Guidance against diffusers' own functions, and against what the papers promise of it."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.guider_utils import rescale_noise_cfg

from diffusion.errors import GazeError
from diffusion.guidance import Guidance, classifier_free, projected, rescaled


def predictions(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(3, 4, 8, 6, generator=generator) for _ in range(2))


def test_classifier_free_guidance_at_its_fixed_points():
    uncond, cond = predictions()
    torch.testing.assert_close(classifier_free(uncond, cond, 1.0), cond)
    assert torch.equal(classifier_free(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(classifier_free(uncond, cond, 7.5), 7.5 * cond - 6.5 * uncond, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_is_diffusers(share):
    uncond, cond = predictions()
    guided = classifier_free(uncond, cond, 7.5)
    torch.testing.assert_close(rescaled(guided, cond, share), rescale_noise_cfg(guided, cond, share))


def test_rescaled_fully_has_the_spread_of_the_prompts_prediction_in_each_picture():
    uncond, cond = predictions()
    back = rescaled(classifier_free(uncond, cond, 7.5), cond, 1.0)
    torch.testing.assert_close(back.std((1, 2, 3)), cond.std((1, 2, 3)))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("norm", [2.0, 15.0, 1e9])
def test_projected_is_diffusers(eta, norm):
    uncond, cond = predictions()
    ours = projected(cond, cond - uncond, 6.0, eta, norm)
    theirs = normalized_guidance(cond, uncond, 5.0, None, eta, norm, use_original_formulation=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_projected_with_all_of_the_difference_is_classifier_free():
    uncond, cond = predictions()
    ours = projected(cond, cond - uncond, 6.0, eta=1.0, norm=math.inf)
    torch.testing.assert_close(ours, classifier_free(uncond, cond, 6.0), rtol=1e-5, atol=1e-5)


def test_projected_moves_nothing_along_the_prompts_picture():
    uncond, cond = predictions()
    moved = projected(cond, cond - uncond, 6.0, eta=0.0, norm=15.0) - cond
    assert ((moved * cond).sum((1, 2, 3)) / cond.square().sum((1, 2, 3))).abs().max() < 1e-6
    assert moved.norm() > 1


def test_projected_of_equal_predictions_is_the_prediction():
    cond, _ = predictions()
    assert torch.equal(projected(cond, cond - cond, 6.0, 0.0, 15.0), cond)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"scale": math.nan}, "scale"),
        ({"rescale": 1.5}, "rescale"),
        ({"rescale": math.nan}, "rescale"),
        ({"interval": (5.0, 1.0)}, "interval"),
        ({"interval": (-1.0, 1.0)}, "interval"),
        ({"norm": 0.0}, "norm"),
        ({"momentum": 1.0}, "momentum"),
        ({"projected": True, "rescale": 0.5}, "rescale"),
    ],
)
def test_a_bad_value_is_named(values, named):
    with pytest.raises(GazeError, match=named):
        Guidance(**values)


def test_guidance_acts_above_the_lower_end_up_to_the_upper():
    guidance = Guidance(2.0, interval=(0.5, 3.0))
    assert [guidance.acts(sigma) for sigma in (0.5, 0.6, 3.0, 3.1)] == [False, True, True, False]
    assert not Guidance(1.0).acts(1.0)
