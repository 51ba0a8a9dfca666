"""Maps of attention: sums over words, sizes, entropy, and what a recorder sees while a picture is made."""

import math

import pytest
import torch

from diffusion.attention_maps import by_word, entropy, spread


def weights(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator, dtype=torch.float64).softmax(dim=-1)


def test_a_words_map_is_the_sum_of_its_tokens():
    weights_BNS, of_S = weights(2, 3, 5), (2, 0, 0, 1, 2)
    maps_BWN = by_word(weights_BNS, of_S, 3)
    for b in range(2):
        for n in range(3):
            sums = [0.0, 0.0, 0.0]
            for s, word in enumerate(of_S):
                sums[word] += weights_BNS[b, n, s].item()
            assert maps_BWN[b, :, n].tolist() == pytest.approx(sums, abs=1e-12)
    each = [by_word(weights_BNS[b : b + 1], of_S, 3) for b in range(2)]
    both = by_word(weights_BNS, torch.tensor([of_S, of_S[::-1]]), 4)
    assert both.shape == (2, 4, 3)
    assert torch.allclose(both[0, :3], each[0][0])
    assert torch.allclose(both[1, :3], by_word(weights_BNS[1:].flip(-1), of_S, 3)[0])
    assert not both[:, 3].any()  # a word without tokens


@pytest.mark.parametrize("size", [(6, 8), (5, 9), (3, 4), (2, 2)])
def test_maps_of_another_size_still_sum_to_one(size):
    maps_BWN = by_word(weights(2, 12, 5), (0, 1, 2, 2, 0), 3)
    maps_BWHW = spread(maps_BWN, (3, 4), size)
    assert maps_BWHW.shape == (2, 3, *size)
    assert torch.allclose(maps_BWHW.sum(dim=1), torch.ones(2, *size, dtype=torch.float64), atol=1e-12)
    assert maps_BWHW.min() >= maps_BWN.min() - 1e-12


def test_a_map_keeps_its_place():
    maps_BWN = torch.zeros(1, 1, 12)
    maps_BWN[0, 0, 1 * 4 + 3] = 1  # second row, last column
    assert torch.equal(spread(maps_BWN, (3, 4), (3, 4))[0, 0].nonzero(), torch.tensor([[1, 3]]))
    larger_HW = spread(maps_BWN, (3, 4), (12, 16))[0, 0]
    assert larger_HW[4:8, 14:].min() > 0.6
    assert larger_HW[:, :10].max() == 0
    assert larger_HW.sum().item() == pytest.approx(16)


def test_entropy_of_known_maps():
    maps_BWHW = torch.zeros(1, 4, 4, 6, dtype=torch.float64)
    maps_BWHW[0, 0] = 0.01
    maps_BWHW[0, 1, 2, 3] = 0.7
    maps_BWHW[0, 2, :, :3] = 5.0
    expected = [math.log(24), 0, math.log(12), 0]
    assert entropy(maps_BWHW)[0].tolist() == pytest.approx(expected, abs=1e-12)


def test_gradients_pass_and_are_finite():
    scores_BNS = torch.randn(1, 12, 5, dtype=torch.float64, requires_grad=True)

    def value(scores_BNS):
        return entropy(spread(by_word(scores_BNS.softmax(-1), (0, 1, 2, 2, 0), 3), (3, 4), (6, 7)))

    assert torch.autograd.gradcheck(value, scores_BNS)
    maps_BWHW = torch.zeros(1, 1, 2, 2, requires_grad=True)
    entropy(maps_BWHW).sum().backward()
    assert maps_BWHW.grad.isfinite().all()
