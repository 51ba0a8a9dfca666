"""Activations that are computed twice instead of kept: less memory for more time (Chen et al. 2016, section 3)."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention import TransformerBlock
from .clip import Layer
from .unet import ResidualBlock

BLOCKS = (ResidualBlock, TransformerBlock, Layer)


def recompute(network: nn.Module) -> None:
    """From now on, each block of `network` keeps only its inputs for the way back, and runs again there.

    network: a U-Net, text encoder or autoencoder, or a module that holds some. Gradients stay the same to the bit where
    the kernels are deterministic, and so do names and weights. The blocks of a network without this stay as they are.
    """
    for block in network.modules():
        if isinstance(block, BLOCKS):
            # Not a SpatialTransformer: the iterator that it is given would be empty the second time. Nothing here
            # draws random numbers, so their state need not be put back.
            again = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.forward = again  # type: ignore[method-assign]
