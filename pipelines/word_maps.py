"""What a picture's maps are: asked for, recorded while it is drawn, and given to the caller.

Shapes: W maps of a picture (one for each word, or for each chosen pixel), H W height and width, T steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffusion.attention_maps import Recorded, Recorder, read_pixels, read_words, spread
from diffusion.attention_sites import Site, sites
from diffusion.denoiser import Denoiser
from diffusion.errors import GazeError
from diffusion.samplers import Denoise
from diffusion.unet import UNet
from diffusion.words import Words, words_of

from .checks import texts, two, whole

if TYPE_CHECKING:
    from .request import Plan, Request
    from .text_to_image import Around


@dataclass(frozen=True, eq=False)
class Maps:
    """Maps of one picture, float32 on the CPU. They are held at the latents' size and brought to the picture's when
    they are asked for. steps: the numbers of those they are the mean of."""

    size: tuple[int, int]  # of the picture: height, width
    steps: tuple[int, ...]
    held_WHW: Tensor = field(repr=False)
    held_TWHW: Tensor | None = field(repr=False)  # of each step, if they were kept

    @property
    def maps(self) -> Tensor:
        """The maps, W x H x W, at the picture's size."""
        return self._spread(self.held_WHW)

    def step(self, number: int) -> Tensor:
        """The same of one step. Raises GazeError for one whose maps were not kept."""
        if self.held_TWHW is None:
            raise GazeError("the maps of single steps were not kept", "map_each_step=True")
        if number not in self.steps:
            raise GazeError(f"no maps of step {number!r} were kept", f"one of {', '.join(map(str, self.steps))}")
        return self._spread(self.held_TWHW[self.steps.index(number)])

    def _spread(self, held_WHW: Tensor) -> Tensor:
        return spread(held_WHW[None].flatten(-2), (held_WHW.shape[1], held_WHW.shape[2]), self.size)[0]


@dataclass(frozen=True, eq=False, repr=False)
class WordMaps(Maps):
    """How much each pixel looks at each word: over all words and special tokens a pixel's shares sum to 1."""

    named: Words

    def __repr__(self) -> str:
        return f"WordMaps(words={self.words}, size={self.size}, steps={self.steps})"

    @property
    def words(self) -> tuple[str, ...]:
        """The words in their order, as often as each stands in the prompt, then the special tokens, as "<start>"."""
        return self.named.names

    def word(self, word: str) -> Tensor:
        """The map of a word, H x W, all its places added up; case does not matter. Raises GazeError where the prompt
        does not have it."""
        return self._spread(self.held_WHW[self.named.numbers(word)].sum(dim=0, keepdim=True))[0]


@dataclass(frozen=True, eq=False)
class PixelMaps(Maps):
    """How much each chosen pixel looks at every pixel: over the picture a map sums to 1.

    pixels: (x, y) of each, from the left and from the top."""

    pixels: tuple[tuple[int, int], ...]

    def _spread(self, held_WHW: Tensor) -> Tensor:
        return _shares(super()._spread(held_WHW))


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is to be recorded, checked. words, pixels: the attentions; none of them: no such maps. heads: by their
    numbers from 0, or all. steps: by their numbers from 1."""

    words: list[Site]
    pixels: list[Site]
    places: tuple[tuple[int, int], ...]  # (x, y)
    heads: list[int] | None
    steps: tuple[int, ...]
    each: bool


def wanted_maps(unet: UNet, request: Request, height: int, width: int, total: int) -> Wanted | None:
    """The maps that a request asks for, None for none. total: how many steps there are. Raises GazeError."""
    for name in ("word_maps", "map_each_step"):
        if not isinstance(getattr(request, name), bool):
            raise GazeError(f"{name} is {getattr(request, name)!r}", "True or False")
    chosen = {name: getattr(request, name) for name in ("map_layers", "map_steps", "map_heads")}
    given = [name for name, value in chosen.items() if value is not None] + ["map_each_step"] * request.map_each_step
    places = _places(request.pixel_maps, height, width)
    if not request.word_maps and not places:
        if given:
            raise GazeError(
                f"{given[0]} was given, but no maps were asked for", "word_maps=True, or pixel_maps=[(x, y)]"
            )
        return None
    patterns = None if request.map_layers is None else texts("map_layers", request.map_layers)
    layers = sites(unet, None, patterns)
    words = [site for site in layers if site.cross and request.word_maps]
    pixels = [site for site in layers if not site.cross and places]
    for kind, found, asked in (
        ("the text", words, request.word_maps),
        ("the picture itself", pixels, places),
    ):
        if asked and not found:
            among = "in this model" if patterns is None else f"among map_layers {patterns}"
            raise GazeError(f"no attention to {kind} is {among}", "map_layers '*', and a model that has it")
    return Wanted(
        words,
        pixels,
        places,
        None if request.map_heads is None else _heads(request.map_heads, [*words, *pixels]),
        tuple(range(1, total + 1)) if request.map_steps is None else _steps(request.map_steps, total),
        request.map_each_step,
    )


def _listed(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise GazeError(f"{name} is {value!r}", "a list with at least one")
    return value


def _steps(value: Any, total: int) -> tuple[int, ...]:
    steps = sorted({whole("a step of map_steps", step, 1) for step in _listed("map_steps", value)})
    if steps[-1] > total:
        raise GazeError(f"map_steps has step {steps[-1]}, but this run has {total}", f"steps from 1 to {total}")
    return tuple(steps)


def _heads(value: Any, places: Sequence[Site]) -> list[int]:
    heads = sorted({whole("a head of map_heads", head, 1) for head in _listed("map_heads", value)})
    least = min(places, key=lambda site: site.layer.heads)
    if heads[-1] > least.layer.heads:
        raise GazeError(
            f"map_heads has head {heads[-1]}, but {least.name} has {least.layer.heads}",
            f"heads from 1 to {least.layer.heads}, or other map_layers",
        )
    return [head - 1 for head in heads]


def _places(value: Any, height: int, width: int) -> tuple[tuple[int, int], ...]:
    if value is None or (isinstance(value, Sequence) and not value):
        return ()
    places = [two("a pixel of pixel_maps", place) for place in _listed("pixel_maps", value)]
    return tuple((whole("x of a pixel", x, 0, width - 1), whole("y of a pixel", y, 0, height - 1)) for x, y in places)


class Group(NamedTuple):
    """What was recorded of pictures that are drawn together, as far as it was asked for and there is any.

    rows: the numbers of these pictures. named: the words of each. places: of the chosen pixels."""

    rows: list[int]
    named: list[Words]
    places: tuple[tuple[int, int], ...]
    words: Recorded | None
    pixels: Recorded | None


class Recording:
    """The maps of all pictures of a plan, while they are drawn."""

    def __init__(self, plan: Plan, wanted: Wanted, window: int) -> None:
        """window: the tokens of a chunk of a prompt."""
        self.plan, self.wanted, self.window = plan, wanted, window
        self.groups: list[tuple[list[int], list[Words], Recorder, Recorder]] = []

    def around(self, outer: Around | None) -> Around:
        """What takes down the attention of a denoiser, as it is with all that `outer` changes."""
        plan, wanted = self.plan, self.wanted
        shares = [(y / plan.height, x / plan.width) for x, y in wanted.places]

        def watched(denoiser: Denoiser, rows: list[int]) -> Denoise:
            denoise = denoiser if outer is None else outer(denoiser, rows)
            context_BSE = denoiser.alone.condition.context_BSE
            chunks = context_BSE.shape[1] // self.window
            named = [words_of(plan.readings[plan.prompts[row]][0], self.window, chunks) for row in rows]
            of_BS = torch.tensor([words.of_S for words in named], device=context_BSE.device)
            read = read_words(of_BS, max(len(words.names) for words in named), wanted.heads)
            words = Recorder(wanted.words, read, wanted.steps, wanted.each)
            pixels = Recorder(wanted.pixels, read_pixels(shares, wanted.heads), wanted.steps, wanted.each)
            self.groups.append((rows, named, words, pixels))
            return words.around(pixels.around(denoise))

        return watched

    def end_step(self) -> list[Group]:
        """Says that a step is done. What was recorded so far, which later steps leave as it is."""
        places = self.wanted.places
        return [
            Group(rows, named, places, words.end_step(), pixels.end_step())
            for rows, named, words, pixels in self.groups
        ]


def word_maps(plan: Plan, groups: Sequence[Group]) -> list[WordMaps]:
    """Of each picture in its order; none at all where none were recorded."""
    found = {
        row: WordMaps(*_held(plan, group.words, at, len(named.names)), named)
        for group in groups
        if group.words is not None
        for at, (row, named) in enumerate(zip(group.rows, group.named, strict=True))
    }
    return [found[row] for row in sorted(found)]


def pixel_maps(plan: Plan, groups: Sequence[Group]) -> list[PixelMaps]:
    """As `word_maps`."""
    found = {}
    for group in groups:
        if group.pixels is None:
            continue
        for at, row in enumerate(group.rows):
            size, steps, mean_WHW, each_TWHW = _held(plan, group.pixels, at, len(group.places))
            each_TWHW = None if each_TWHW is None else _shares(each_TWHW)
            found[row] = PixelMaps(size, steps, _shares(mean_WHW), each_TWHW, group.places)
    return [found[row] for row in sorted(found)]


def _shares(maps: Tensor) -> Tensor:
    """Maps, whatever there is of them, each brought to a sum of 1."""
    return maps / maps.sum(dim=(-2, -1), keepdim=True)


def _held(
    plan: Plan, recorded: Recorded, at: int, count: int
) -> tuple[tuple[int, int], tuple[int, ...], Tensor, Tensor | None]:
    """The fields of `Maps` of a picture: the at-th of those recorded together, which has so many maps."""
    mean_WHW = recorded.mean_BWHW[at, :count].float().cpu()
    each = [maps_BWHW[at, :count].float().cpu() for maps_BWHW in recorded.each]
    return (plan.height, plan.width), recorded.steps, mean_WHW, torch.stack(each) if each else None
