"""Pictures <-> latents (Kingma & Welling 2013; Rombach et al. 2022, section 3.1), with diffusers' parameter names."""

# Shapes: B batch, C channels, H W height and width in pixels; latents are C x H/factor x W/factor. N pixels of a map.

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention
from .config import Config
from .errors import GazeError
from .files import load_strictly, read_json, read_weights, write_part
from .tiling import in_tiles
from .unet import Level, Resample, ResidualBlock

EPS = 1e-6  # of every group norm; the U-Net's residual blocks have 1e-5
LOG_VARIANCES = (-30.0, 20.0)  # so that neither it nor its exponential leaves the numbers


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """The options of a `vae/config.json` that are read."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32  # pixels it was trained at; it takes any multiple of its factor
    scaling_factor: float = 0.18215  # brings the latents to unit variance
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    NAME: ClassVar[str] = "autoencoder config"
    KIND: ClassVar[tuple[str, str]] = ("_class_name", "AutoencoderKL")
    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        # Of later models, whose latents have a mean:
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }
    IGNORED: ClassVar[dict[str, str]] = {"force_upcast": "the caller chooses the dtype; weights are read as float32"}

    def __post_init__(self) -> None:
        levels, groups = len(self.block_out_channels), self.norm_num_groups
        sizes = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
        self.check_positive(*sizes, "in_channels", "out_channels", "scaling_factor")
        self.check_blocks(levels * (2 * self.layers_per_block + 1), "layers_per_block")
        for option, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            right = getattr(self, option) == (kind,) * levels
            self.check(right, option, f"{kind} is needed for each of {levels} levels")
        divides = all(channels % groups == 0 for channels in self.block_out_channels)
        self.check(divides, "block_out_channels", f"norm_num_groups, {groups}, must divide each")


class PixelAttention(Attention):
    """Self-attention of one head over the pixels of a feature map, as a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, EPS)

    def forward(self, x_BCHW: Tensor) -> Tensor:  # type: ignore[override]
        x_BNC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        out_BNC = super().forward(x_BNC, self.keys_values(x_BNC))
        return x_BCHW + out_BNC.transpose(1, 2).unflatten(2, x_BCHW.shape[2:])


def level(config: AutoencoderConfig, in_channels: int, channels: int, layers: int) -> Level:
    groups = config.norm_num_groups
    inputs = [in_channels] + [channels] * (layers - 1)
    return Level([ResidualBlock(c, channels, groups, eps=EPS) for c in inputs], [])


def middle(config: AutoencoderConfig) -> Level:
    channels = config.block_out_channels[-1]
    block = level(config, channels, channels, layers=2)
    if config.mid_block_add_attention:
        block.attentions.append(PixelAttention(channels, config.norm_num_groups))
    return block


def run(block: Level, x_BCHW: Tensor) -> Tensor:
    for resnet, attention in block.layers():
        x_BCHW = resnet(x_BCHW)
        x_BCHW = x_BCHW if attention is None else attention(x_BCHW)
    return x_BCHW


class Encoder(nn.Module):
    """Pixels -> mean and log-variance of the latents, one after the other along C."""

    down_blocks: Any  # ModuleList of Level

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        pairs = zip((channels[0], *channels), channels, strict=False)
        self.down_blocks = nn.ModuleList(level(config, above, here, config.layers_per_block) for above, here in pairs)
        for block, width in zip(self.down_blocks[:-1], channels, strict=False):
            block.downsamplers.append(Resample(width, stride=2, padding=0))
        self.mid_block = middle(config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = run(block, x)
            for downsample in block.downsamplers:
                x = downsample(F.pad(x, (0, 1, 0, 1)))
        return self.conv_out(F.silu(self.conv_norm_out(run(self.mid_block, x))))


class Decoder(nn.Module):
    """Latents -> pixels."""

    up_blocks: Any  # ModuleList of Level

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = middle(config)
        pairs = zip((channels[0], *channels), channels, strict=False)
        self.up_blocks = nn.ModuleList(level(config, below, here, config.layers_per_block + 1) for below, here in pairs)
        for block, width in zip(self.up_blocks[:-1], channels, strict=False):
            block.upsamplers.append(Resample(width, stride=1))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[-1], EPS)
        self.conv_out = nn.Conv2d(channels[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = run(self.mid_block, self.conv_in(x))
        for block in self.up_blocks:
            x = run(block, x)
            for upsample in block.upsamplers:
                x = upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """factor: pixels per latent in each direction. latent_channels: C of the latents."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.latent_channels = config.latent_channels
        both, one = 2 * config.latent_channels, config.latent_channels
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(both, both, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(one, one, 1) if config.use_post_quant_conv else nn.Identity()
        self.decoder = Decoder(config)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Autoencoder:
        """Fresh weights. GazeError: an option that is unknown or has an unsupported value."""
        return cls(AutoencoderConfig.from_diffusers(config))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Open a `vae/` folder, for use. GazeError: missing or broken files, an unsupported config, other weights."""
        config = AutoencoderConfig.from_diffusers(read_json(Path(folder) / "config.json"))
        state = {current_name(name): value for name, value in read_weights(folder, dtype=dtype).items()}
        return load_strictly(partial(cls, config), state, folder).eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a `vae/` folder; dtype None keeps that of the parameters."""
        write_part(folder, self.config.to_diffusers(), self.state_dict(), dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """C, H and W of the latents of a picture of height x width pixels."""
        return self.latent_channels, height // self.factor, width // self.factor

    def posterior(self, pixels_BCHW: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] -> mean and log-variance of the latents before scaling, each BCHW. tile: see `decode`."""

        def moments(x_BCHW: Tensor) -> Tensor:
            return self.quant_conv(self.encoder(x_BCHW))

        if tile is None:
            mean_BCHW, log_variance_BCHW = moments(pixels_BCHW).chunk(2, dim=1)
        else:
            overlap = self.latent_overlap(tile) * self.factor
            mean_BCHW, log_variance_BCHW = in_tiles(moments, pixels_BCHW, tile, overlap).chunk(2, dim=1)
        return mean_BCHW, log_variance_BCHW.clamp(*LOG_VARIANCES)

    def reconstruct(self, latents_BCHW: Tensor) -> Tensor:
        """Latents before scaling -> pixels in about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents_BCHW))

    def latent_overlap(self, tile: int) -> int:
        """Rows of latents that tiles of so many pixels share: a quarter. GazeError: a tile that is too small for that,
        or that the factor does not divide."""
        if isinstance(tile, bool) or not isinstance(tile, int) or tile % self.factor or tile < 4 * self.factor:
            raise GazeError(f"tile is {tile!r}", f"a multiple of {self.factor} pixels, at least {4 * self.factor}")
        return tile // self.factor // 4

    def scale_to(self, latents_BCHW: Tensor) -> None:
        """Sets the scaling factor under which these latents, given before scaling, have unit variance."""
        self.config = dataclasses.replace(self.config, scaling_factor=float(1 / latents_BCHW.std()))

    def encode(self, pixels_BCHW: Tensor, tile: int | None = None) -> tuple[Tensor, Tensor]:
        """Pixels in [-1, 1] -> mean and standard deviation of the scaled latents, each BCHW. tile: see `decode`."""
        mean_BCHW, log_variance_BCHW = self.posterior(pixels_BCHW, tile)
        scale = self.config.scaling_factor
        return mean_BCHW * scale, (0.5 * log_variance_BCHW).exp() * scale

    def decode(self, latents_BCHW: Tensor, tile: int | None = None) -> Tensor:
        """Scaled latents -> pixels in about [-1, 1], not clamped.

        tile: to bound memory, picture by picture and each in overlapping tiles of so many pixels (`in_tiles`). The
        norms and the attention then see a tile, so a picture larger than that comes out a little different.
        """
        latents_BCHW = latents_BCHW / self.config.scaling_factor
        if tile is None:
            return self.reconstruct(latents_BCHW)
        overlap = self.latent_overlap(tile)
        return in_tiles(self.reconstruct, latents_BCHW, tile // self.factor, overlap)


def current_name(name: str) -> str:
    """Names of the attention of the middle block as they were before diffusers 0.15, which SD 1.x folders hold."""
    if ".attentions." not in name:
        return name
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name
