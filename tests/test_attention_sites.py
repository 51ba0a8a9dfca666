"""Attentions by name, and the seam: who sees it, in which order, and that nothing of it stays."""

import threading

import pytest
import torch

from diffusion.attention import Attention
from diffusion.attention_sites import attending, sites
from diffusion.errors import GazeError
from diffusion.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    block_out_channels=(8, 16, 16),
    layers_per_block=1,
    transformer_layers_per_block=(1, 2, 1),
    attention_head_dim=2,
    cross_attention_dim=8,
    norm_num_groups=4,
)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet(CONFIG).eval().requires_grad_(False)


def run(unet, height=16, width=16):
    generator = torch.Generator().manual_seed(1)
    x_BCHW = torch.randn(1, 4, height, width, generator=generator)
    return unet(x_BCHW, 500.0, torch.randn(1, 5, 8, generator=generator))


def plain(unet):
    return not any("attend" in vars(site.layer) for site in sites(unet))


def double(site, usual, *tensors):
    return 2 * usual(*tensors)


def test_the_sites_are_all_attentions_in_the_order_of_their_calls(unet):
    called = []
    found = sites(unet)

    def note(site, usual, *tensors):
        called.append(site.name)
        return usual(*tensors)

    with attending(found, note):
        run(unet)
    assert called == [site.name for site in found]
    assert {site.layer for site in found} == {layer for layer in unet.modules() if isinstance(layer, Attention)}
    assert all(unet.get_submodule(site.name) is site.layer for site in found)
    assert [site.name for site in found if site.cross] == [site.name for site in sites(unet, cross=True)]
    assert [site.name.endswith("attn1") for site in found] == [not site.cross for site in found]


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (9, 5), (1, 1)])
def test_the_size_of_a_site_is_that_of_its_pixels(unet, size):
    seen = {}

    def note(site, usual, q_BLND, *others):
        seen[site.name] = q_BLND.shape[2], site.size(*size)
        return usual(q_BLND, *others)

    with attending(sites(unet), note):
        run(unet, *size)
    assert len(seen) == len(sites(unet))
    assert all(pixels == height * width for pixels, (height, width) in seen.values())
    assert {site.level for site in sites(unet)} == {0, 1, 2}


def test_layers_by_pattern(unet):
    names = [site.name for site in sites(unet, layers=["up_blocks.*", "mid_block.*"])]
    assert names == [site.name for site in sites(unet) if not site.name.startswith("down")]
    assert len(sites(unet, cross=True, layers=["*.attn2"])) == len(sites(unet)) / 2
    assert sites(unet, layers=[]) == []
    with pytest.raises(GazeError) as caught:
        sites(unet, layers=["*", "up_block.*"])
    assert caught.value.problem == "no attention is named 'up_block.*'"
    assert caught.value.hint.startswith("did you mean 'up_blocks.")
    assert caught.value.hint.endswith(
        "choices: down_blocks.0.*, down_blocks.1.*, mid_block.*, up_blocks.1.*, up_blocks.2.*"
    )
    with pytest.raises(GazeError, match="no attention is named"):
        sites(unet, cross=True, layers=["*.attn1"])


def test_what_is_put_in_is_taken_out(unet):
    before = run(unet)
    with attending(sites(unet), double):
        assert not torch.equal(run(unet), before)
    assert plain(unet)
    assert torch.equal(run(unet), before)


def test_usual_changes_nothing(unet):
    before = run(unet)
    with attending(sites(unet), lambda site, usual, *tensors: usual(*tensors)):
        assert torch.equal(run(unet), before)


def test_an_inner_block_comes_before_an_outer_one(unet):
    order = []

    def noting(name):
        def attend(site, usual, *tensors):
            order.append(name)
            return usual(*tensors)

        return attend

    places = sites(unet)[:1]
    with attending(places, noting("outer")):
        with attending(places, noting("inner")):
            run(unet)
        run(unet)
    assert order == ["inner", "outer", "outer"]
    assert plain(unet)


@pytest.mark.parametrize("inside", [0, 1])
def test_an_error_inside_leaves_all_as_it_was(unet, inside):
    before = run(unet)

    def fail(site, usual, *tensors):
        raise RuntimeError("no")

    def broken():
        with attending(sites(unet), double), attending(sites(unet, cross=True), fail if inside else double):
            run(unet)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        broken()
    assert plain(unet)
    assert torch.equal(run(unet), before)


def test_an_error_on_the_way_in_leaves_all_as_it_was(unet):
    first, second, *_ = sites(unet)
    with pytest.raises(TypeError), attending([first, second._replace(layer=None)], double):
        pass
    assert plain(unet)


def test_a_kernel_that_a_layer_had_of_its_own_comes_back(unet):
    place = sites(unet)[0]

    def own(*tensors):
        return 3 * Attention.attend(*tensors)

    place.layer.attend = own
    try:
        before = run(unet)
        with attending(sites(unet), lambda site, usual, *tensors: usual(*tensors)):
            assert torch.equal(run(unet), before)
        assert vars(place.layer)["attend"] is own
    finally:
        del place.layer.attend
    assert plain(unet)


def test_other_threads_do_not_notice(unet):
    """Two threads with blocks of their own that overlap, and one without."""
    before = run(unet)
    with attending(sites(unet), double):
        doubled = run(unet)
    assert not torch.equal(doubled, before)
    both, results = threading.Barrier(3, timeout=60), {}

    def work(name, attend):
        if attend is None:
            both.wait()
            results[name] = run(unet)
            both.wait()
            return
        with attending(sites(unet), attend):
            both.wait()
            results[name] = run(unet)
            both.wait()

    threads = [
        threading.Thread(target=work, args=(number, attend))
        for number, attend in enumerate((None, double, lambda site, usual, *tensors: usual(*tensors)))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(results[number], expected) for number, expected in enumerate((before, doubled, before))] == [
        True, True, True,
    ]  # fmt: skip
    assert plain(unet)


def test_a_thread_that_leaves_first_takes_out_its_own_only(unet):
    before = run(unet)
    inside, leave = threading.Event(), threading.Event()

    def work():
        with attending(sites(unet), double):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    with attending(sites(unet), double):
        thread.start()
        inside.wait(60)
    assert torch.equal(run(unet), before)  # the other is still inside
    assert not plain(unet)
    leave.set()
    thread.join()
    assert plain(unet)
