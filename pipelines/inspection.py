"""What a model is and what it costs, from its configs and headers alone: no weight is read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffusion.attention import Attention, SpatialTransformer
from diffusion.autoencoder import Autoencoder
from diffusion.convert import read_structure
from diffusion.errors import GazeError
from diffusion.hub import local_path
from diffusion.noise import NoiseSchedule
from diffusion.single_file import open_single_file
from diffusion.unet import UNet

from .checks import picture_size
from .shipped import place_of

BYTES = {"float32": 4, "bfloat16": 2}


def inspect(
    path: str | Path | None = None,
    height: int | None = None,
    width: int | None = None,
    prediction_type: str | None = None,
) -> dict[str, Any]:
    """What `table` prints. path: a model folder or single file; None: the shipped model. height, width: pixels; None:
    those that the model was trained at. prediction_type: instead of what the model says.

    flops: of one U-Net forward for one picture (a multiplication and an addition are two); guidance doubles them.
    memory: bytes of the weights, of what a step with guidance and the decoding of one picture add to them, and the most
    of all at once. Raises GazeError for a model that cannot be opened; the weights of a folder are not looked at.
    """
    path = local_path(place_of(path))
    if not os.path.exists(path):
        raise GazeError(f"model {str(path)!r} does not exist", "check the path")
    single = path.is_file()
    structure = open_single_file(path, prediction_type).structure if single else read_structure(path, prediction_type)
    with torch.device("meta"):
        unet, vae = UNet(structure.unet), Autoencoder(structure.vae)
    height, width = picture_size(structure.unet.sample_size, vae.factor, height, width)
    latents = vae.latent_shape(height, width)[1:]
    tokens = structure.texts["text_encoder"].max_position_embeddings
    shapes = structure.shapes()
    parameters = {part: sum(map(_size, part_shapes.values())) for part, part_shapes in shapes.items()}
    total = sum(parameters.values())
    step, decode = 2 * step_floats(unet, *latents), decode_floats(vae, *latents)
    memory = {
        dtype: {"weights": total * size, "step": step * size, "decode": decode * size}
        | {"peak": (total + max(step, decode)) * size}
        for dtype, size in BYTES.items()
    }
    return {
        "model": str(path),
        "format": f"single file, {structure.family.name}" if single else "folder",
        "pipeline": structure.family.pipeline,
        "prediction_type": NoiseSchedule.from_config(structure.schedule).prediction_type,
        "unet_channels": list(structure.unet.block_out_channels),
        "in_channels": structure.unet.in_channels,
        "latent_channels": structure.vae.latent_channels,
        "text_width": sum(text.hidden_size for text in structure.texts.values()),
        "cross_attention": None if structure.unet.cross_attention_dim is None else structure.unet.cross_attention_score,
        "tokens": tokens,
        "parameters": parameters | {"total": total},
        "height": height,
        "width": width,
        "flops": unet_flops(unet, *latents, tokens),
        "memory": memory,
    }


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _levels(unet: UNet, height: int, width: int) -> list[tuple[Any, int, int]]:
    """Each level in the order of `UNet.denoise`, with its pixels and those after its up- or downsampler."""
    pixels = [height * width]
    for _ in unet.down_blocks[1:]:
        height, width = -(-height // 2), -(-width // 2)
        pixels.append(height * width)
    down = zip(unet.down_blocks, pixels, [*pixels[1:], pixels[-1]], strict=True)
    up = zip(unet.up_blocks, pixels[::-1], [*pixels[-2::-1], pixels[0]], strict=True)
    return [*down, (unet.mid_block, pixels[-1], pixels[-1]), *up]


def unet_flops(unet: UNet, height: int, width: int, tokens: int) -> int:
    """Floating-point operations of one forward for one row: latents of height x width, a text of so many tokens.

    Those of matrix products and convolutions: every weight is used once for each place that it is applied to, beside
    `Attention.flops`.
    """
    weights = 0  # multiplications
    for layer, places in ((unet.conv_in, height * width), (unet.conv_out, height * width), (unet.time_embedding, 1)):
        weights += places * _weights(layer)
    weights += _weights(unet.add_embedding) if hasattr(unet, "add_embedding") else 0
    attention = 0
    for level, pixels, after in _levels(unet, height, width):
        for name, module in level.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                resamples = name.startswith(("downsamplers", "upsamplers"))
                of_text = name.endswith(("attn2.to_k", "attn2.to_v"))
                places = 1 if name.endswith("time_emb_proj") else tokens if of_text else after if resamples else pixels
                weights += places * module.weight.numel()
            if isinstance(module, Attention):
                attention += module.flops(pixels, tokens if name.endswith("attn2") else pixels)
    return 2 * weights + attention


def _weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d))


def step_floats(unet: UNet, height: int, width: int) -> int:
    """The most numbers alive at once in a forward for one row: the skip connections, and what a layer works on.

    A residual block normalises and activates beside its input; a transformer's widest place is the gated feed-forward.
    """
    first = unet.config.block_out_channels[0]
    skips = [first * height * width]
    most = 0
    for level, pixels, after in _levels(unet, height, width):
        goes_up = any(level is block for block in unet.up_blocks)
        for resnet, transformer in level.layers():
            inputs, outputs = resnet.norm1.num_channels * pixels, resnet.norm2.num_channels * pixels
            if goes_up:
                skips.pop()
            most = max(most, sum(skips) + _residual(inputs, outputs) + goes_up * inputs)
            if isinstance(transformer, SpatialTransformer):
                most = max(most, sum(skips) + 20 * outputs)
            if level is not unet.mid_block and not goes_up:
                skips.append(outputs)
        for resample in level.downsamplers:
            skips.append(resample.conv.out_channels * after)
    return most


def _residual(inputs: int, outputs: int) -> int:
    """Numbers beside the input of a residual block."""
    return max(2 * inputs, 4 * outputs)


def decode_floats(vae: Autoencoder, height: int, width: int) -> int:
    """The most numbers alive at once in the decoding of latents of height x width."""
    most = 0
    for index, level in enumerate(vae.decoder.up_blocks):
        pixels = height * width * 4**index
        for resnet in level.resnets:
            inputs, outputs = resnet.norm1.num_channels * pixels, resnet.norm2.num_channels * pixels
            most = max(most, inputs + _residual(inputs, outputs))
    return most


def table(report: dict[str, Any]) -> str:
    """The report in a few lines of text."""
    parameters = report["parameters"]
    size = f"{report['width']}x{report['height']}"
    lines = [
        ("model", f"{report['model']} ({report['format']})"),
        (
            "structure",
            f"{report['pipeline']}, U-Net {'-'.join(map(str, report['unet_channels']))} channels, "
            f"{report['in_channels']} in, text {report['tokens']} x {report['text_width']}, "
            f"cross-attention: {report['cross_attention'] or 'none'}",
        ),
        ("prediction", report["prediction_type"]),
        *((part, f"{count:,} parameters") for part, count in parameters.items()),
        ("U-Net forward", f"{report['flops'] / 1e9:,.1f} GFLOP for one picture of {size}, twice with guidance"),
    ]
    for dtype, memory in report["memory"].items():
        mib = {name: f"{count / 2**20:,.0f}" for name, count in memory.items()}
        parts = f"weights {mib['weights']}, a step with guidance {mib['step']}, decoding {mib['decode']}"
        lines.append((f"in {dtype}", f"about {mib['peak']} MiB at most ({parts})"))
    return "\n".join(f"{name:<15}{text}" for name, text in lines)
