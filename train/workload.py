"""The arithmetic and memory of a recipe's step, counted over its own networks without running them.

On torch's meta device tensors have shapes and no numbers, so a whole step of any batch takes seconds on any machine;
what it would compute and keep is counted operation by operation.
"""

# Shapes: B batch, C latent channels, H W latent size, S tokens of the text, P width of the pooled vector.

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from diffusion.autoencoder import Autoencoder, AutoencoderConfig
from diffusion.clip import CLIPText, CLIPTextConfig
from diffusion.convert import read_structure
from diffusion.errors import GazeError
from diffusion.files import read_json
from diffusion.hub import local_path
from diffusion.recompute import recompute
from diffusion.single_file import open_single_file
from diffusion.unet import UNet
from pipelines.shipped import DEFAULT_MODEL, place_of

from .choice import choose, text_frozen
from .config import Recipe
from .model import fresh_unet
from .text_phase import _Foretell

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Workload:
    """The networks of a recipe with random weights, and its step on random pictures.

    module: holds what trains. beside: networks that run in each step and do not train. forward: a batch's size -> what
    the loss is taken of, under the device that the networks lie on.
    """

    module: nn.Module
    beside: nn.ModuleList
    forward: Callable[[int], Tensor]


def make_workload(recipe: Recipe, device: torch.device) -> Workload:
    """Raises GazeError for a model that cannot be opened or a size that does not fit it. No weights are read."""
    with device:
        made = MAKERS[recipe.phase](recipe)
    if recipe.gradient_checkpointing:
        recompute(made.module)
    return made


def _autoencoder(recipe: Recipe) -> Workload:
    vae = Autoencoder.from_config(recipe.model.autoencoder)
    _side(recipe, vae)

    def forward(batch: int) -> Tensor:
        pixels_BCHW = torch.randn(batch, 3, recipe.data.size, recipe.data.size)
        return vae.reconstruct(vae.posterior(pixels_BCHW)[0])

    return Workload(vae, nn.ModuleList(), forward)


def _text(recipe: Recipe) -> Workload:
    vae, text = _vae(recipe), _text_encoder(recipe)
    side = _side(recipe, vae)
    encoder: Any = SimpleNamespace(model=text, width=text.config.hidden_size)
    module = _Foretell(encoder, (vae.latent_channels, side, side))

    def forward(batch: int) -> Tensor:
        _encode(recipe, vae, batch)
        return module(_tokens(text, batch))

    return Workload(module, nn.ModuleList([vae]), forward)


def _diffusion(recipe: Recipe) -> Workload:
    unet, vae, texts = _fresh(recipe) if recipe.model.init_from is None else _opened(recipe.model.init_from)
    side, both = _side(recipe, vae), len(texts) > 1
    model: Any = SimpleNamespace(
        unet=unet, texts={part: SimpleNamespace(model=text, penultimate=both) for part, text in texts.items()}
    )
    choose(model, recipe.model)
    frozen = text_frozen(model)
    named = {part.replace("encoder", "model"): text for part, text in texts.items()}
    width = sum(text.config.hidden_size for text in texts.values())
    vector_width = unet.config.projection_class_embeddings_input_dim

    def read(batch: int) -> tuple[Tensor, Tensor | None]:
        if frozen and recipe.data.cache_text:
            window = next(iter(texts.values())).config.max_position_embeddings
            return torch.randn(batch, window, width), torch.randn(batch, vector_width or 1)
        if not both:
            states_BSE = texts["text_encoder"](_tokens(texts["text_encoder"], batch))
            return states_BSE, states_BSE[:, 0]
        ends_B = torch.zeros(batch, dtype=torch.long)
        each = [text.penultimate(_tokens(text, batch), ends_B) for text in texts.values()]
        return torch.cat([states for states, _ in each], dim=-1), each[-1][1]

    def forward(batch: int) -> Tensor:
        _encode(recipe, vae, batch)
        with torch.set_grad_enabled(not frozen):
            context_BSE, pooled_BP = read(batch)
        vector_BV = None  # the pooled text and, in SDXL, the sinusoids of six sizes
        if vector_width is not None and pooled_BP is not None:
            vector_BV = F.pad(pooled_BP, (0, vector_width - pooled_BP.shape[1]))
        x_BCHW = torch.randn(batch, unet.config.in_channels, side, side)
        return unet(x_BCHW, torch.rand(batch), context_BSE, vector_BV)

    module = nn.ModuleDict({"unet": unet, **({} if frozen else named)})
    return Workload(module, nn.ModuleList([vae, *(texts.values() if frozen else ())]), forward)


MAKERS = {"autoencoder": _autoencoder, "text": _text, "diffusion": _diffusion}


def _fresh(recipe: Recipe) -> tuple[UNet, Autoencoder, dict[str, CLIPText]]:
    vae, text = _vae(recipe), _text_encoder(recipe)
    return UNet(fresh_unet(recipe, vae, text.config.hidden_size)), vae, {"text_encoder": text}


def _opened(init_from: str) -> tuple[UNet, Autoencoder, dict[str, CLIPText]]:
    path = local_path(place_of(init_from))
    if not path.exists():
        raise GazeError(f"model.init_from {init_from!r} does not exist", "check the path")
    with torch.device("cpu"):  # the noise levels are looked at
        structure = open_single_file(path).structure if path.is_file() else read_structure(path)
    texts = {part: structure.text_encoder(part) for part in structure.texts}
    return UNet(structure.unet), Autoencoder(structure.vae), texts


def _vae(recipe: Recipe) -> Autoencoder:
    folder = recipe.model.autoencoder_from or DEFAULT_MODEL / "vae"
    return Autoencoder(AutoencoderConfig.from_diffusers(read_json(folder / "config.json")))


def _text_encoder(recipe: Recipe) -> CLIPText:
    """A learned tokenizer has at most recipe.model.text.vocab_size tokens; here it has all of them."""
    if recipe.model.text_from is not None:
        return CLIPText(CLIPTextConfig.from_diffusers(read_json(recipe.model.text_from / "text_encoder/config.json")))
    size = recipe.model.text
    config = CLIPTextConfig(size.vocab_size, size.width, 4 * size.width, size.layers, size.heads, size.window, "gelu")
    return CLIPText(config)


def _side(recipe: Recipe, vae: Autoencoder) -> int:
    """Of a square picture's latents."""
    if recipe.data.size % vae.factor:
        raise GazeError(
            f"data.size {recipe.data.size} does not divide by {vae.factor}, the autoencoder's factor",
            f"data.size={max(recipe.data.size // vae.factor, 1) * vae.factor}",
        )
    return recipe.data.size // vae.factor


def _tokens(text: CLIPText, batch: int) -> Tensor:
    return torch.zeros(batch, text.config.max_position_embeddings, dtype=torch.long)


def _encode(recipe: Recipe, vae: Autoencoder, batch: int) -> None:
    """What a step does for its latents: nothing, where they were encoded before training."""
    if not recipe.data.cache_latents:
        with torch.no_grad():
            vae.posterior(torch.randn(batch, 3, recipe.data.size, recipe.data.size))


class Cost(NamedTuple):
    """Of a forward and backward for one micro-batch. flops: of matrix products and convolutions, a multiplication and
    an addition being two. model_flops: without what gradient checkpointing computes again. forward_flops: of these, the
    forward's. bytes: the most at once beside the weights. kernels: how many make a result of their own."""

    flops: int
    model_flops: int
    forward_flops: int
    bytes: int
    kernels: int


def count(recipe: Recipe, batch: int, keep: bool = True) -> Cost:
    """What a forward and backward for `batch` pictures costs, counted on the meta device. keep: gradients stay, as
    before an optimizer's step, instead of going as soon as they are there."""
    found = _trace(recipe, batch, keep)
    once = recipe.model_copy(update={"gradient_checkpointing": False})
    model = _trace(once, batch, keep) if recipe.gradient_checkpointing else found
    return Cost(found.flops, model.flops, model.forward, found.most, found.kernels)


def _trace(recipe: Recipe, batch: int, keep: bool) -> Tally:
    work = make_workload(recipe, torch.device("meta"))
    for parameter in work.module.parameters():
        if parameter.requires_grad and not keep:
            parameter.register_post_accumulate_grad_hook(lambda full: setattr(full, "grad", None))
    with Tally() as tally, AsOnGpu(tally, HALF.get(recipe.mixed_precision)):
        with torch.device("meta"):
            out = work.forward(batch)
        tally.forward = tally.flops
        # Tensor.backward would leave the mode, and gradient checkpointing runs forward again within it.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.run_backward((out,), (torch.empty_like(out),), False, False, (), accumulate_grad=True)
    return tally


class Tally(TorchDispatchMode):
    """Counts, within it, FLOPs by torch's own table, and the bytes of tensors that are made and still referred to.
    most: the most of them at once. kernels: how often one was made. forward: to be set, FLOPs up to some point."""

    def __init__(self) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary()
        self.now = self.most = self.flops = self.forward = self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        self.most = max(self.most, self.now)
        kind = getattr(func, "_overloadpacket", None)
        if kind in flop_registry:
            self.flops += flop_registry[kind](*args, **(kwargs or {}), out_val=out)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known[storage] = storage.nbytes()
            self.now += storage.nbytes()
            self.kernels += 1
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size


class AsOnGpu(TorchFunctionMode):
    """Has torch keep what it would keep on a GPU: autocast to `half` as its documentation lists, and fused attention,
    which never holds its N x S weights (Dao et al. 2022) and whose FLOPs `tally` cannot see."""

    LOW = (F.linear, torch.conv2d)
    SINGLE = (F.group_norm, F.layer_norm)

    def __init__(self, tally: Tally, half: torch.dtype | None) -> None:
        super().__init__()
        self.tally, self.half = tally, half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Fused.apply(self.tally, *(self._cast(value, self.half) for value in args[:3]))
        if func in self.LOW:
            args = [self._cast(value, self.half) for value in args]
        elif func in self.SINGLE:
            args = [self._cast(value, self.half and torch.float32) for value in args]
        return func(*args, **(kwargs or {}))

    def _cast(self, value: Any, dtype: torch.dtype | None) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and dtype is not None else value


class _Fused(torch.autograd.Function):
    """Attention's memory, and 4 * N * S * D FLOPs a head forward and twice that backward."""

    @staticmethod
    def forward(ctx: Any, tally: Tally, q_BLND: Tensor, k_BLSD: Tensor, v_BLSD: Tensor) -> Tensor:
        out_BLND = torch.empty_like(q_BLND)
        ctx.save_for_backward(q_BLND, k_BLSD, v_BLSD, out_BLND)
        ctx.tally, ctx.flops = tally, 4 * q_BLND.numel() * k_BLSD.shape[2]
        tally.flops += ctx.flops
        return out_BLND

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.tally.flops += 2 * ctx.flops
        return None, *(torch.empty_like(value) for value in ctx.saved_tensors[:3])
