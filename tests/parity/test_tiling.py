"""Tiles of the autoencoder: diffusers' tiling where the two mean the same, and what the whole picture would be."""

import pytest
import torch
from diffusers import AutoencoderKL

from diffusion.autoencoder import Autoencoder
from diffusion.errors import GazeError
from diffusion.tiling import in_tiles

TILE = 32  # pixels; 16 latents, of which 4 overlap


@pytest.fixture(scope="module")
def pair():
    """diffusers' autoencoder with tiles, and ours with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=TILE,
        ).eval()
    theirs.enable_tiling()
    ours = Autoencoder.from_config(dict(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.requires_grad_(False), ours.requires_grad_(False)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def crossings(height, width, stride, overlap):
    """Where four tiles meet. There diffusers weighs the upper left one twice, because it fades tiles into neighbours
    that were themselves faded before."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None]
    fading = [(axis >= stride) & (axis % stride < overlap) for axis in (rows, columns)]
    return fading[0] & fading[1]


# Sizes where diffusers has no last tile that lies within the one before it.
@pytest.mark.parametrize("height, width", [(32, 12), (10, 44), (32, 44), (44, 24), (60, 20)])
def test_tiles_are_those_of_diffusers(pair, height, width):
    theirs, ours = pair
    latents = noise(2, 4, height, width)
    expected = theirs.decode(latents / ours.config.scaling_factor).sample
    found = ours.decode(latents, TILE)
    assert found.shape == expected.shape
    apart = crossings(2 * height, 2 * width, 24, 8)
    assert (found - expected).abs().amax((0, 1))[~apart].max() < 1e-5
    assert not torch.allclose(found, ours.decode(latents), atol=1e-3), "tiles do make a difference here"
    pixels = noise(2, 3, 2 * height, 2 * width)
    posterior = theirs.encode(pixels).latent_dist
    mean, log_variance = ours.posterior(pixels, TILE)
    apart = crossings(height, width, 12, 4)
    for value, other in ((mean, posterior.mean), (log_variance, posterior.logvar)):
        assert (value - other).abs().amax((0, 1))[~apart].max() < 1e-5
    scaled, std = ours.encode(pixels, TILE)
    assert torch.equal(scaled, mean * ours.config.scaling_factor)
    assert torch.equal(std, (0.5 * log_variance).exp() * ours.config.scaling_factor)


@pytest.mark.parametrize("size", [(16, 16), (5, 16), (1, 3)])
def test_a_picture_within_one_tile_is_decoded_whole(pair, size):
    _, ours = pair
    latents = noise(1, 4, *size)
    assert torch.equal(ours.decode(latents, TILE), ours.decode(latents))
    pixels = noise(1, 3, 2 * size[0], 2 * size[1])
    assert all(torch.equal(a, b) for a, b in zip(ours.encode(pixels, TILE), ours.encode(pixels), strict=True))


def test_pictures_one_by_one_are_the_pictures_of_the_batch(pair):
    _, ours = pair
    latents = noise(5, 4, 16, 12)
    torch.testing.assert_close(ours.decode(latents, TILE), ours.decode(latents), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("overlap", [0, 2, 4, 8])
@pytest.mark.parametrize("height, width", [(1, 1), (16, 17), (20, 31), (33, 12), (100, 50)])
def test_tiles_of_a_function_without_a_view_of_the_whole_are_the_whole(height, width, overlap):
    """Of pixels alone, that is, so that every tile says the same: weights add up to one everywhere."""
    x = noise(2, 3, height, width).double()

    def larger(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    torch.testing.assert_close(in_tiles(larger, x, 16, overlap), larger(x), atol=1e-12, rtol=0)


def test_tiles_fade_linearly_and_no_tile_is_larger_than_asked_for():
    sizes = []

    def number(x):
        sizes.append(tuple(x.shape))
        return torch.full_like(x, float(len(sizes)))

    row = in_tiles(number, torch.zeros(1, 1, 1, 10, dtype=torch.float64), 4, 2)[0, 0, 0]
    assert row.tolist() == [1, 1, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4]
    assert sizes == [(1, 1, 1, 4)] * 4
    square = in_tiles(number, torch.zeros(1, 1, 6, 6, dtype=torch.float64), 4, 2)[0, 0] - 4
    assert square[3, 3] == 0.25 * (1 + 2 + 3 + 4), "where four tiles meet each counts by its row times its column"


@pytest.mark.parametrize("tile", [0, -32, 6, 33, 32.0, "32", True])
def test_tiles_that_cannot_be_are_refused(pair, tile):
    _, ours = pair
    for action in (ours.decode, ours.encode):
        with pytest.raises(GazeError, match=r"(?s)tile is .*a multiple of 2 pixels, at least 8"):
            action(noise(1, 4 if action == ours.decode else 3, 16, 16), tile)
