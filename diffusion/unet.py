"""The U-Net of latent diffusion (Rombach et al. 2022; SDXL: Podell et al. 2023), with diffusers' parameter names.

Shapes: B batch, C channels, H W latent size, S tokens of the text, E width of the text embedding, V width of SDXL's
vector, L heads, D width of a head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import KeysValues, MakeAttention, SpatialTransformer, TransformerBlock, same_rows
from .config import Config
from .errors import GazeError
from .files import load_strictly, read_json, read_weights, write_part
from .scores import KINDS

PerLevel = int | tuple[int, ...]


@dataclass(frozen=True)
class UNetConfig(Config):
    """The options of diffusers' `unet/config.json` that are read; `FIXED` and `IGNORED` are the others.

    Three things are ours alone: cross_attention_score, a cross_attention_dim of None (no attention to the text) and
    the addition_embed_type "pooled". diffusers cannot open a model that has one of them.
    """

    sample_size: int | tuple[int, int] | None = None  # latent size the model was trained at; the U-Net takes any
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: PerLevel = 2
    transformer_layers_per_block: PerLevel = 1
    attention_head_dim: PerLevel = 8  # despite its name the NUMBER of heads
    cross_attention_dim: int | None = 1280  # None: no cross-attention
    cross_attention_score: str = "dot"  # a key of KINDS
    norm_num_groups: int = 32
    use_linear_projection: bool = False
    # A vector added to the time embedding. "text_time": pooled text and size numbers (SDXL); "pooled": the text alone
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None  # width of each embedded size number inside that vector
    projection_class_embeddings_input_dim: int | None = None  # V, width of that vector

    NAME: ClassVar[str] = "U-Net config"
    KIND: ClassVar[tuple[str, str]] = ("_class_name", "UNet2DConditionModel")
    OWN: ClassVar[tuple[str, ...]] = ("cross_attention_score",)
    FIXED: ClassVar[dict[str, Any]] = {
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": False,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "dropout": 0.0,
        "act_fn": "silu",
        "norm_eps": 1e-5,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "class_embeddings_concat": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_norm": None,
    }
    IGNORED: ClassVar[dict[str, str]] = {
        "upcast_attention": "the fused kernel keeps its softmax in fp32 whatever the dtype",
        "addition_embed_type_num_heads": "used by addition_embed_type 'text' only, which is refused",
    }

    def __post_init__(self) -> None:
        self.check_positive("block_out_channels", "in_channels", "out_channels", "norm_num_groups")
        if self.cross_attention_dim is not None:
            self.check_positive("cross_attention_dim")
        levels, groups = len(self.block_out_channels), self.norm_num_groups
        for option, known in (
            ("down_block_types", {"DownBlock2D", "CrossAttnDownBlock2D"}),
            ("up_block_types", {"UpBlock2D", "CrossAttnUpBlock2D"}),
        ):
            self.check(set(getattr(self, option)) <= known, option, f"the types known are {', '.join(sorted(known))}")
            self.check(len(getattr(self, option)) == levels, option, f"there are {levels} block_out_channels")
        for option in ("layers_per_block", "transformer_layers_per_block", "attention_head_dim"):
            self.check(len(self.per_level(option)) == levels, option, f"there are {levels} block_out_channels")
            self.check(min(self.per_level(option)) > 0, option, "it must be at least 1")
        sizes = zip(self.per_level("layers_per_block"), self.per_level("transformer_layers_per_block"), strict=True)
        self.check_blocks(sum(depth * (2 * layers + 1) for layers, depth in sizes), "layers_per_block")
        divides = all(channels % groups == 0 for channels in self.block_out_channels)
        self.check(divides, "block_out_channels", f"norm_num_groups, {groups}, must divide each")
        ways = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        attends = [any(kind.startswith("CrossAttn") for kind in kinds) for kinds in ways]
        attends[-1] = True  # the middle block
        shares = zip(attends, self.block_out_channels, self.per_level("attention_head_dim"), strict=True)
        divides = all(channels % heads == 0 for attending, channels, heads in shares if attending)
        self.check(divides, "attention_head_dim", "this is the number of heads and must divide block_out_channels")
        score = self.cross_attention_score
        self.check(score in KINDS, "cross_attention_score", f"those known are {', '.join(KINDS)}")
        spare = self.cross_attention_dim is None and score != "dot"
        self.check(not spare, "cross_attention_score", "cross_attention_dim is None: nothing is scored")
        kind, width = self.addition_embed_type, self.projection_class_embeddings_input_dim
        kind_known = kind in (None, "text_time", "pooled")
        self.check(kind_known, "addition_embed_type", "only text_time is known, and pooled, which is ours")
        width_known = kind is None or (width is not None and width > 0)
        self.check(width_known, "projection_class_embeddings_input_dim", f"{kind} needs the width of its vector")
        sized = kind == "pooled" and self.addition_time_embed_dim is not None
        self.check(not sized, "addition_time_embed_dim", "addition_embed_type pooled has no size numbers")

    @property
    def reads_text(self) -> bool:
        """Whether what it predicts depends on the text."""
        return self.cross_attention_dim is not None or self.addition_embed_type is not None

    @property
    def is_diffusers(self) -> bool:
        """Whether diffusers knows all of it."""
        own = self.cross_attention_score != "dot" or self.addition_embed_type == "pooled"
        return not own and self.cross_attention_dim is not None

    def per_level(self, option: str) -> tuple[int, ...]:
        """The option's value for each level of the way down, where one number stands for all levels."""
        value = getattr(self, option)
        return (value,) * len(self.block_out_channels) if isinstance(value, int) else value


def sinusoid(timestep_B: Tensor, width: int) -> Tensor:
    """Timesteps (fractions allowed) as cosines and sines of falling frequency (Vaswani et al. 2017, section 3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32, device=timestep_B.device))
    angles = timestep_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedding(nn.Module):
    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x.to(self.linear_1.weight.dtype))))


class ResidualBlock(nn.Module):
    """Two convolutions; the time, where there is one, shifts what lies between them (Ho et al. 2020, appendix B)."""

    def __init__(
        self, in_channels: int, channels: int, groups: int, time_width: int | None = None, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        if time_width is not None:
            self.time_emb_proj = nn.Linear(time_width, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, channels, 1) if in_channels != channels else nn.Identity()

    def forward(self, x_BCHW: Tensor, shift_BC: Tensor | None = None) -> Tensor:
        hidden_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        if shift_BC is not None:
            hidden_BCHW = hidden_BCHW + shift_BC[:, :, None, None]
        return self.conv_shortcut(x_BCHW) + self.conv2(F.silu(self.norm2(hidden_BCHW)))


class Resample(nn.Module):
    """The convolution between two levels: with stride 2 on the way down, after repeating pixels on the way up."""

    def __init__(self, channels: int, stride: int, padding: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=padding)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Level(nn.Module):
    """The layers of one resolution: residual blocks, each followed by an attention as far as there are any."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def layers(self) -> Iterator[tuple[Any, Any]]:
        return itertools.zip_longest(self.resnets, self.attentions)


class UNet(nn.Module):
    """x_BCHW, timestep, text -> what the model predicts, BCHW. Any H and W.

    Text-only and time-only work is separable: `forward` is `denoise(x, embed_time(...), project_context(...))`, and the
    two inner results can be kept for as long as the text and the schedule stay.
    """

    # ModuleList of Level. Any, because a ModuleList knows its items as Module only.
    down_blocks: Any
    up_blocks: Any

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        time_width = 4 * channels[0]
        heads, depths = config.per_level("attention_head_dim"), config.per_level("transformer_layers_per_block")
        layers = config.per_level("layers_per_block")
        cross: MakeAttention | None = None
        if config.cross_attention_dim is not None:
            cross = partial(KINDS[config.cross_attention_score], source_channels=config.cross_attention_dim)

        def level(i: int, in_channels: list[int], attentions: int) -> Level:
            transformer = partial(
                SpatialTransformer,
                channels[i],
                heads[i],
                cross=cross,
                depth=depths[i],
                groups=config.norm_num_groups,
                linear=config.use_linear_projection,
            )
            resnets = [ResidualBlock(c, channels[i], config.norm_num_groups, time_width) for c in in_channels]
            return Level(resnets, [transformer() for _ in range(attentions)])

        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.time_embedding = Embedding(channels[0], time_width)
        vector_width = config.projection_class_embeddings_input_dim
        if config.addition_embed_type is not None and vector_width is not None:
            self.add_embedding = Embedding(vector_width, time_width)

        skips = [channels[0]]  # channels of every skip connection, in the order in which the way down makes them
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            attends = kind == "CrossAttnDownBlock2D"
            block = level(i, [skips[-1]] + [channels[i]] * (layers[i] - 1), layers[i] if attends else 0)
            skips += [channels[i]] * layers[i]
            if i < len(channels) - 1:
                block.downsamplers.append(Resample(channels[i], stride=2))
                skips.append(channels[i])
            self.down_blocks.append(block)

        self.mid_block = level(len(channels) - 1, [channels[-1]] * 2, 1)

        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for i, kind in zip(reversed(range(len(channels))), config.up_block_types, strict=True):
            attends = kind == "CrossAttnUpBlock2D"
            inputs = [c + skips.pop() for c in [below] + [channels[i]] * layers[i]]
            block = level(i, inputs, len(inputs) if attends else 0)
            if i > 0:
                block.upsamplers.append(Resample(channels[i], stride=1))
            below = channels[i]
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def zero_residuals(self) -> UNet:
        """Start every residual branch and the output at zero, for training from scratch (Dhariwal & Nichol 2021)."""
        ends = ("conv2", "proj_out", "conv_out")
        for name, parameter in self.named_parameters():
            if name.split(".")[-2] in ends:
                nn.init.zeros_(parameter)
        return self

    def in_order(self, kind: type[nn.Module]) -> list[Any]:
        """The modules of a kind in the order in which `denoise` calls them."""
        parts = (*self.down_blocks, self.mid_block, *self.up_blocks)
        layers = (layer for part in parts for pair in part.layers() for layer in pair if layer is not None)
        return [module for layer in layers for module in layer.modules() if isinstance(module, kind)]

    def embed_time(self, timestep: Tensor | float, vector_BV: Tensor | None = None) -> list[Tensor]:
        """The shift_BC of every residual block, for timesteps of shape [B] or one for all rows (then B is 1).

        GazeError: a vector that is missing, or given to a model that has no use for it.
        """
        if (vector_BV is None) == hasattr(self, "add_embedding"):
            wants = "needs a vector (pooled text and size numbers)" if vector_BV is None else "takes no vector"
            raise GazeError(f"this U-Net {wants}: addition_embed_type is {self.config.addition_embed_type!r}")
        timestep_B = torch.as_tensor(timestep, device=self.conv_in.weight.device).reshape(-1)
        embedding = self.time_embedding(sinusoid(timestep_B, self.config.block_out_channels[0]))
        if vector_BV is not None:
            embedding = embedding + self.add_embedding(vector_BV)
        active = F.silu(embedding)
        return [block.time_emb_proj(active) for block in self.in_order(ResidualBlock)]

    def vector(self, pooled_BP: Tensor | None, sizes: Sequence[int] | Tensor) -> Tensor | None:
        """vector_BV, or None for a model without one: the pooled text; with text_time then the sinusoids of six
        numbers, of each row (a tensor B6) or of all: height and width of the original picture, top and left of the
        crop, height and width wanted (Podell et al. 2023, section 2.2)."""
        if pooled_BP is None or self.config.addition_embed_type != "text_time":
            return pooled_BP if self.config.addition_embed_type == "pooled" else None
        width = self.config.addition_time_embed_dim or 0
        sizes_B6 = torch.as_tensor(sizes, device=pooled_BP.device).expand(len(pooled_BP), -1)
        embedded = sinusoid(sizes_B6.flatten(), width).unflatten(0, sizes_B6.shape).flatten(1)
        return torch.cat([pooled_BP, embedded.to(pooled_BP.dtype)], dim=1)

    def project_context(self, context_BSE: Tensor, weight_BS: Tensor | None = None) -> list[KeysValues]:
        """The text's k_BLSD and v_BLSD for every transformer block, nothing for one without cross-attention. weight_BS:
        see `Condition`; a token of share p gets w p / sum(w p), because log(w) is added to its scores. One of each row
        at least must not be hidden."""
        bias = () if weight_BS is None else (weight_BS.float().log().to(context_BSE.dtype)[:, None, None],)
        layers = [block.attn2 for block in self.in_order(TransformerBlock)]
        return [() if layer is None else (*layer.keys_values(context_BSE), *bias) for layer in layers]

    def denoise(self, x_BCHW: Tensor, shifts: Sequence[Tensor], texts: Sequence[KeysValues]) -> Tensor:
        """`forward` after `embed_time` and `project_context`.

        The texts may have a multiple of x's rows (negative prompts first, then positive): what comes before the first
        cross-attention is then computed once on x's rows, and the result has the texts' rows; without one it has x's.
        The shifts have x's rows, or one for all.
        """
        shift, text = iter(shifts), iter(texts)
        x = self.conv_in(x_BCHW)
        skips = [x]
        for block in self.down_blocks:
            for resnet, attention in block.layers():
                x = resnet(x, next(shift))
                x = x if attention is None else attention(x, text)
                skips.append(x)
            for downsample in block.downsamplers:
                x = downsample(x)
                skips.append(x)
        for resnet, attention in self.mid_block.layers():
            x = resnet(x, next(shift))
            x = x if attention is None else attention(x, text)
        for block in self.up_blocks:
            for resnet, attention in block.layers():
                x = resnet(torch.cat(same_rows(x, skips.pop()), dim=1), next(shift))
                x = x if attention is None else attention(x, text)
            for upsample in block.upsamplers:
                # To the size of the skip connection, so that sizes which halving rounds come back.
                x = upsample(F.interpolate(x, size=skips[-1].shape[2:], mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def forward(
        self,
        x_BCHW: Tensor,
        timestep: Tensor | float,
        context_BSE: Tensor,
        vector_BV: Tensor | None = None,
        weight_BS: Tensor | None = None,
    ) -> Tensor:
        """timestep: of shape [B], or one number for all; fractions allowed. vector_BV: see `vector`.
        weight_BS: see `project_context`."""
        return self.denoise(x_BCHW, self.embed_time(timestep, vector_BV), self.project_context(context_BSE, weight_BS))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> UNet:
        """Open a diffusers `unet/` folder. GazeError: missing or broken files, an unsupported config, other weights."""
        config = UNetConfig.from_diffusers(read_json(Path(folder) / "config.json"))
        return load_strictly(partial(cls, config), read_weights(folder, dtype=dtype), folder)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a diffusers `unet/` folder; dtype None keeps that of the parameters."""
        # state_dict would have FSDP2 take apart what it has gathered; there are no buffers.
        write_part(folder, self.config.to_diffusers(), dict(self.named_parameters()), dtype=dtype)
