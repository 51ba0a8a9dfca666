"""The key layout of Stable Diffusion's original checkpoints (CompVis, Stability AI), as one table of names.

Left, a name here, which is diffusers'; right, the original one. A rule holds for a name and for all that continue it
after a dot; the first that fits counts; a name that no rule fits is the same on both sides. In a rule, {i} is the level
and {j} the layer of a block, else the block's last; what can stand for them on the right is in `numbers`. Names that
come to the same original one are its equal parts along the rows, in their order here: OpenCLIP keeps queries, keys and
values in one matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PIXEL_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
SHORTCUT = {"conv_shortcut": "nin_shortcut"}


def inside(name: str, original: str, parts: dict[str, str]) -> dict[str, str]:
    """Rules for the parts of a block."""
    return {f"{name}.{part}": f"{original}.{theirs}" for part, theirs in parts.items()}


NAMES: dict[str, dict[str, str]] = {
    "unet": {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        **inside("down_blocks.{i}.resnets.{j}", "input_blocks.{down}.0", RESIDUAL),
        "down_blocks.{i}.attentions.{j}": "input_blocks.{down}.1",
        "down_blocks.{i}.downsamplers.0.conv": "input_blocks.{down}.0.op",
        **inside("mid_block.resnets.{j}", "middle_block.{twice}", RESIDUAL),
        "mid_block.attentions.0": "middle_block.1",
        **inside("up_blocks.{i}.resnets.{j}", "output_blocks.{up}.0", RESIDUAL),
        "up_blocks.{i}.attentions.{j}": "output_blocks.{up}.1",
        "up_blocks.{i}.upsamplers.0.conv": "output_blocks.{up}.{after}.conv",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    },
    "vae": {
        **inside("encoder.down_blocks.{i}.resnets.{j}", "encoder.down.{i}.block.{j}", SHORTCUT),
        "encoder.down_blocks.{i}.resnets.{j}": "encoder.down.{i}.block.{j}",
        "encoder.down_blocks.{i}.downsamplers.0": "encoder.down.{i}.downsample",
        "encoder.mid_block.resnets.{j}": "encoder.mid.block_{next}",
        **inside("encoder.mid_block.attentions.0", "encoder.mid.attn_1", PIXEL_ATTENTION),
        "encoder.conv_norm_out": "encoder.norm_out",
        "decoder.mid_block.resnets.{j}": "decoder.mid.block_{next}",
        **inside("decoder.mid_block.attentions.0", "decoder.mid.attn_1", PIXEL_ATTENTION),
        **inside("decoder.up_blocks.{i}.resnets.{j}", "decoder.up.{mirror}.block.{j}", SHORTCUT),
        "decoder.up_blocks.{i}.resnets.{j}": "decoder.up.{mirror}.block.{j}",
        "decoder.up_blocks.{i}.upsamplers.0": "decoder.up.{mirror}.upsample",
        "decoder.conv_norm_out": "decoder.norm_out",
    },
    "clip": {},
    "open_clip": {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "encoder.layers.{i}.layer_norm1": "transformer.resblocks.{i}.ln_1",
        "encoder.layers.{i}.layer_norm2": "transformer.resblocks.{i}.ln_2",
        "encoder.layers.{i}.mlp.fc1": "transformer.resblocks.{i}.mlp.c_fc",
        "encoder.layers.{i}.mlp.fc2": "transformer.resblocks.{i}.mlp.c_proj",
        "encoder.layers.{i}.self_attn.q_proj.weight": "transformer.resblocks.{i}.attn.in_proj_weight",
        "encoder.layers.{i}.self_attn.k_proj.weight": "transformer.resblocks.{i}.attn.in_proj_weight",
        "encoder.layers.{i}.self_attn.v_proj.weight": "transformer.resblocks.{i}.attn.in_proj_weight",
        "encoder.layers.{i}.self_attn.q_proj.bias": "transformer.resblocks.{i}.attn.in_proj_bias",
        "encoder.layers.{i}.self_attn.k_proj.bias": "transformer.resblocks.{i}.attn.in_proj_bias",
        "encoder.layers.{i}.self_attn.v_proj.bias": "transformer.resblocks.{i}.attn.in_proj_bias",
        "encoder.layers.{i}.self_attn.out_proj": "transformer.resblocks.{i}.attn.out_proj",
        "final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    },
}
POINTWISE = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")  # a 1x1 convolution there, a linear layer here
TRANSPOSED = re.compile(r"\.text_projection$")  # multiplied from the right there


class Counts(NamedTuple):
    """What the numbers of the blocks depend on. layers: residual blocks of a level on the way down. attends: whether
    each level has attention, in the order of the way up."""

    levels: int = 1
    layers: int = 1
    attends: Sequence[bool] = ()


def numbers(counts: Counts, i: int, j: int) -> dict[str, int]:
    """What stands for the names in braces of an original name, for level i and layer j."""
    return {
        "i": i,
        "j": j,
        "next": j + 1,
        "twice": 2 * j,
        "mirror": counts.levels - 1 - i,
        "down": i * (counts.layers + 1) + j + 1,  # one list of residual blocks and downsamplers, after conv_in
        "up": i * (counts.layers + 1) + j,
        "after": 1 + (i < len(counts.attends) and counts.attends[i]),  # the upsampler comes after the attention
    }


def original_names(kind: str, names: Iterable[str], counts: Counts) -> dict[str, str]:
    """The original name of each name of a part, without its prefix. kind: a key of NAMES."""
    rules = [
        (re.compile(re.sub(r"\\{(\w)\\}", r"(?P<\1>\\d+)", re.escape(rule)) + r"(?=\.|$)"), original)
        for rule, original in NAMES[kind].items()
    ]

    def rename(name: str) -> str:
        for rule, original in rules:
            match = rule.match(name)
            if match is not None:
                place = {"i": 0, "j": counts.layers, **match.groupdict()}
                return original.format(**numbers(counts, int(place["i"]), int(place["j"]))) + name[match.end() :]
        return name

    return {name: rename(name) for name in names}


def original_shape(name: str, shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of an original tensor that is made of parts of these shapes."""
    shape = (sum(part[0] for part in shapes), *shapes[0][1:])
    if TRANSPOSED.search(name):
        return shape[::-1]
    return (*shape, 1, 1) if POINTWISE.search(name) else shape


def to_original(name: str, value: Tensor) -> Tensor:
    """The tensor as it is under its original name."""
    if TRANSPOSED.search(name):
        return value.t()
    return value[..., None, None] if POINTWISE.search(name) else value


def from_original(name: str, value: Tensor) -> Tensor:
    """The inverse of `to_original`."""
    if TRANSPOSED.search(name):
        return value.t().contiguous()
    return value.flatten(1) if POINTWISE.search(name) else value
