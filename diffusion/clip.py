"""CLIP's text transformer (Radford et al. 2021, section 2.4), with transformers' parameter names.

Shapes: B prompts, S tokens of the text, E width of the text embedding, P width of the pooled vector, L heads,
D width of a head (E = L*D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LARGEST, Config
from .errors import GazeError
from .files import load_strictly, read_json, read_weights, write_part

PREFIX = "text_model."  # of the names in published folders; transformers 5 writes them without, and reads both
UNUSED = ("embeddings.position_ids", "text_projection.weight")  # of older versions; of a projection that has no use


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation that OpenAI's CLIP was trained with (Hendrycks & Gimpel 2016, section 2)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}


@dataclass(frozen=True)
class CLIPTextConfig(Config):
    """The options of a `text_encoder/config.json` that are read."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    # The next three are not needed for the states; transformers finds the prompt's end by the last.
    bos_token_id: int | None = 49406
    pad_token_id: int | None = 1
    eos_token_id: int | None = 49407

    NAME: ClassVar[str] = "text encoder config"
    KIND: ClassVar[tuple[str, str]] = ("model_type", "clip_text_model")
    FIXED: ClassVar[dict[str, Any]] = {"attention_dropout": 0.0}
    IGNORED: ClassVar[dict[str, str]] = {
        "projection_dim": "beside the config, see `pooled_width`: most models have it without a projection",
        "initializer_range": "of fresh weights; unused in CLIP's text transformer",
        "initializer_factor": "of fresh weights, which a file replaces",
        "dropout": "of old versions, which did not use it",
        **dict.fromkeys(
            ("architectures", "dtype", "torch_dtype", "transformers_version"), "a note on how the file was made"
        ),
        **dict.fromkeys(
            ("output_attentions", "output_hidden_states", "return_dict"), "what transformers' own forward returns"
        ),
        **dict.fromkeys(
            ("chunk_size_feed_forward", "id2label", "is_encoder_decoder", "label2id", "problem_type"),
            "every model of transformers has it, CLIP's text transformer does not use it",
        ),
    }

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        self.check_positive(*sizes, "max_position_embeddings")
        self.check_blocks(self.num_hidden_layers, "num_hidden_layers")
        divides = self.hidden_size % self.num_attention_heads == 0
        self.check(divides, "num_attention_heads", f"it must divide hidden_size, {self.hidden_size}")
        self.check(self.hidden_act in ACTIVATIONS, "hidden_act", f"those known are {', '.join(ACTIVATIONS)}")


class CausalAttention(nn.Module):
    """Every token attends to itself and to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BSE: Tensor) -> Tensor:
        q_BLSD, k_BLSD, v_BLSD = (
            project(x_BSE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BLSD = F.scaled_dot_product_attention(q_BLSD, k_BLSD, v_BLSD, is_causal=True)
        return self.out_proj(out_BLSD.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Attention and feed-forward, each normalised before and added after."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        width, hidden, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps)
        self.self_attn = CausalAttention(width, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x_BSE: Tensor) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.layer_norm1(x_BSE))
        return x_BSE + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x_BSE))))


def pooled_width(config: Mapping[str, Any], folder: Path) -> int:
    """P of the text encoder with a projection that a config.json describes. Raises GazeError when it is none."""
    width = config.get("projection_dim", 512)  # transformers' default
    if type(width) is not int or not 0 < width <= LARGEST:
        raise GazeError(f"{folder} has projection_dim {width!r}", "copy the folder again")
    return width


class CLIPText(nn.Module):
    """Token ids BS -> states BSE of the last layer, normalised. S is at most config.max_position_embeddings.

    pooled: P, for a projection of the state at the prompt's end. A new one needs weights: those of a file, or
    `initialize`.
    """

    def __init__(self, config: CLIPTextConfig, pooled: int | None = None) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size

        def embedding(entries: int) -> nn.Module:
            # nn.Embedding's own start would be thrown away, and on the meta device makes torch import its compiler.
            return nn.Embedding.from_pretrained(torch.empty(entries, width), freeze=False)

        tokens, positions = embedding(config.vocab_size), embedding(config.max_position_embeddings)
        self.embeddings = nn.ModuleDict({"token_embedding": tokens, "position_embedding": positions})
        self.encoder = nn.ModuleDict(
            {"layers": nn.Sequential(*(Layer(config) for _ in range(config.num_hidden_layers)))}
        )
        self.final_layer_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.text_projection = None if pooled is None else nn.Linear(width, pooled, bias=False)

    def embed(self, tokens_BS: Tensor) -> Tensor:
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        return self.embeddings["token_embedding"](tokens_BS) + self.embeddings["position_embedding"](positions_S)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return self.final_layer_norm(self.encoder["layers"](self.embed(tokens_BS)))

    def penultimate(self, tokens_BS: Tensor, ends_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """What SDXL reads (Podell et al. 2023, section 2.1): the states BSE before the last layer, as they are, and,
        where there is a projection, that of each prompt's normalised last state at its end: BP.

        ends_B: the places of the end tokens.
        """
        layers: Any = self.encoder["layers"]
        x_BSE = layers[:-1](self.embed(tokens_BS))
        if self.text_projection is None:
            return x_BSE, None
        ends_BE = self.final_layer_norm(layers[-1](x_BSE))[torch.arange(len(ends_B)), ends_B]
        return x_BSE, self.text_projection(ends_BE)

    @torch.no_grad()
    def initialize(self) -> CLIPText:
        """Fresh weights for training from scratch: normal, narrower in a deeper or wider encoder; biases zero."""
        width, depth = self.config.hidden_size, self.config.num_hidden_layers
        narrow = (2 * width * depth) ** -0.5
        spread = {
            **dict.fromkeys(("token_embedding", "position_embedding"), 0.02),
            **dict.fromkeys(("q_proj", "k_proj", "v_proj", "fc2"), narrow),
            "out_proj": width**-0.5,
            "fc1": (2 * width) ** -0.5,
        }
        for name, parameter in self.named_parameters():
            *_, module, kind = name.split(".")
            if kind == "bias":
                nn.init.zeros_(parameter)
            elif module in spread:
                nn.init.normal_(parameter, std=spread[module])
        return self

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype = torch.float32, projected: bool = False
    ) -> CLIPText:
        """Open a `text_encoder/` folder. projected: with its projection, as SDXL's second one.

        GazeError: missing or broken files, an unsupported config, other weights.
        """
        options = read_json(Path(folder) / "config.json")
        config = CLIPTextConfig.from_diffusers(options)
        pooled = pooled_width(options, Path(folder)) if projected else None
        unused = UNUSED[:1] if projected else UNUSED
        state = {name.removeprefix(PREFIX): value for name, value in read_weights(folder, "model", dtype).items()}
        used = {name: value for name, value in state.items() if name not in unused}
        return load_strictly(partial(cls, config, pooled), used, folder)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write a `text_encoder/` folder; dtype None keeps that of the parameters."""
        state, config = dict(self.named_parameters()), self.config.to_diffusers()  # as UNet.save_pretrained
        if self.text_projection is not None:
            config["projection_dim"] = self.text_projection.out_features
        write_text_encoder(folder, config, state, dtype)


def write_text_encoder(
    folder: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> None:
    """Writes a `text_encoder/` folder as transformers names things; state: by the names here."""
    # Without a dtype in the config, transformers would compute in that of the file, unlike diffusers' other parts. The
    # projection stands beside the text model.
    renamed = {n if n == "text_projection.weight" else PREFIX + n: value for n, value in state.items()}
    write_part(folder, {**config, "dtype": "float32"}, renamed, dtype, stem="model")
