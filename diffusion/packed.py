"""Convolutions on the CPU without laying out their weights anew at every call: the same function up to rounding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KEPT = 8  # layouts per convolution: input sizes and versions of the weight in turn
MOST = 2**27  # bytes of weights; each layout takes as much again


class Layouts(dict[tuple, Tensor]):
    """By input shape and version of the weight. torch cannot copy them, so a copied network makes its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        return Layouts()


def pack(module: nn.Module, most: int = MOST) -> None:
    """Lets each plain convolution of `module` keep its weight in oneDNN's own layout, chosen by the input's shape.

    A layout is made at the first call of a shape and again when the weight has changed. Calls that need gradients,
    another dtype or another device run as before, and so does everything where this torch lacks oneDNN.
    most: a module whose convolutions have more bytes of weights than that is left as it is. There the layouts cost
    gigabytes, and at the sizes of pictures that such models make, laying out is a small part of the time.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return
    plain = [layer for layer in module.modules() if type(layer) is nn.Conv2d and layer.padding_mode == "zeros"]
    if sum(layer.weight.nbytes for layer in plain) > most:
        return
    for convolution in plain:
        convolution.forward = partial(_convolve, convolution, Layouts())  # type: ignore[method-assign]


def _convolve(convolution: nn.Conv2d, layouts: Layouts, x_BCHW: Tensor) -> Tensor:
    c = convolution
    geometry = (c.padding, c.stride, c.dilation, c.groups)
    fp32 = x_BCHW.dtype == c.weight.dtype == torch.float32 and x_BCHW.device.type == c.weight.device.type == "cpu"
    if not fp32 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x_BCHW, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
    version = 0 if c.weight.is_inference() else c.weight._version  # an inference tensor counts no versions
    key = (x_BCHW.shape, c.weight.data_ptr(), version)
    layout = layouts.get(key)
    if layout is None:
        if len(layouts) >= KEPT:
            layouts.clear()
        # Both operators are those that torch.compile's code for the CPU calls.
        dense = c.weight.detach().to_mkldnn()
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub is wrong
        layout = reorder(dense, *geometry, x_BCHW.shape)
        layouts[key] = layout
    return torch.ops.mkldnn._convolution_pointwise(x_BCHW, layout, c.bias, *geometry, "none", [], "")
