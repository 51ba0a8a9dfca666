"""Packed convolutions: the same function, whatever changes around them."""

import copy

import torch
from torch import nn

from diffusion.packed import pack


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.Conv2d(32, 8, 1))


def test_packed_equals_plain_at_every_size_and_batch_in_float64_terms():
    plain, packed = _network(), _network()
    pack(packed)
    exact = copy.deepcopy(plain).double()
    with torch.inference_mode():
        for shape in [(1, 4, 16, 16), (2, 4, 16, 16), (3, 4, 17, 23), (1, 4, 16, 16)]:
            x = torch.randn(shape)
            assert (packed(x) - exact(x.double())).abs().max() < 1e-5
            assert torch.equal(packed(x), packed(x))


def test_a_changed_weight_counts_at_once():
    network = _network()
    pack(network)
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        network(x)
        network[0].weight.mul_(2)
        reference = _network()
        reference[0].weight.mul_(2)
        torch.testing.assert_close(network(x), reference(x), atol=1e-5, rtol=1e-5)
        network[0].weight.data = network[0].weight.data * 3  # as the averaged weights are swapped in and out
        reference[0].weight.mul_(3)
        torch.testing.assert_close(network(x), reference(x), atol=1e-5, rtol=1e-5)


def test_gradients_dtypes_and_state_are_untouched():
    network, plain = _network(), _network()
    pack(network)
    assert network.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(2, 4, 16, 16)
    network(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(network[0].weight.grad, plain[0].weight.grad)
    with torch.inference_mode():
        assert network.double()(x.double()).dtype == torch.float64


def test_a_large_network_is_left_as_it_is():
    weights = sum(layer.weight.nbytes for layer in _network())
    for most, packs in ((weights, True), (weights - 1, False)):
        network = _network()
        pack(network, most)
        assert all(("forward" in vars(layer)) == packs for layer in network)


def test_a_copy_is_a_network_of_its_own():
    network = _network()
    pack(network)
    x = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        before = network(x)
        twin = copy.deepcopy(network)
        assert torch.equal(twin(x), before)
        twin[0].weight.zero_()
        assert torch.equal(network(x), before)
        assert not torch.equal(twin(x), before)
