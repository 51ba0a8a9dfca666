"""The attentions of a U-Net by name, and the one way to put something else in their place for a while."""

# Shapes: B rows, L heads, N tokens of the picture, S of what is attended to, D width of a head.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from threading import Lock, get_ident
from typing import NamedTuple

from torch import Tensor

from .attention import Attention
from .errors import GazeError, nearest
from .unet import UNet


class Site(NamedTuple):
    """name: of the layer in the U-Net, as "mid_block.attentions.0.transformer_blocks.0.attn2". cross: to the text, not
    to the picture itself. level: how often the latents' sides are halved there, each time rounded up."""

    name: str
    cross: bool
    level: int
    layer: Attention

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width there of latents of this size; their product is N."""
        return -(-height // 2**self.level), -(-width // 2**self.level)


def sites(unet: UNet, cross: bool | None = None, layers: Sequence[str] | None = None) -> list[Site]:
    """The attentions in the order in which they are called.

    cross: only those to the text, or only those of the picture to itself. layers: patterns of names, as "up_blocks.*";
    None: all. Raises GazeError for a pattern that none of them has.
    """
    count = len(unet.down_blocks)
    levels = {f"down_blocks.{i}": i for i in range(count)} | {f"up_blocks.{i}": count - 1 - i for i in range(count)}
    names = {module: name for name, module in unet.named_modules()}
    found = []
    for layer in unet.in_order(Attention):
        name = names[layer]
        level = levels.get(name.partition(".attentions")[0], count - 1)  # of the middle block, which has no number
        found.append(Site(name, name.endswith("attn2"), level, layer))
    found = [site for site in found if cross is None or site.cross == cross]
    for pattern in layers or ():
        if not any(fnmatchcase(site.name, pattern) for site in found):
            blocks = {f"{site.name.partition('.attentions')[0]}.*" for site in found}  # there may be 140 names
            raise GazeError(f"no attention is named {pattern!r}", nearest(pattern, blocks))
    return [site for site in found if layers is None or any(fnmatchcase(site.name, pattern) for pattern in layers)]


class Seam:
    """Stands in for a layer's kernel: in threads that have put something there that, in all others what was there."""

    def __init__(self, layer: Attention) -> None:
        self.usual = layer.attend
        self.own = "attend" in vars(layer)  # not the class's
        self.by_thread: dict[int, Callable[..., Tensor]] = {}

    def __call__(self, *args: Tensor) -> Tensor:
        return self.by_thread.get(get_ident(), self.usual)(*args)


_lock = Lock()  # for the moments in which a seam is put in or taken out


@contextmanager
def attending(places: Sequence[Site], attend: Callable[..., Tensor]) -> Iterator[None]:
    """Within, and in this thread alone, these attentions compute attend(site, usual, q_BLND, k_BLSD, v_BLSD, ...) ->
    out_BLND, with a bias_B11S at the end where the layer has one. usual: what they computed before, of these tensors.
    An inner block comes before an outer one.

    Afterwards, also after an error, every layer is as before.
    """
    thread, before = get_ident(), []
    try:
        with _lock:
            for site in places:
                seam = vars(site.layer).get("attend")
                if not isinstance(seam, Seam):
                    seam = Seam(site.layer)
                    site.layer.attend = seam
                was = seam.by_thread.get(thread)
                before.append((site.layer, seam, was))
                seam.by_thread[thread] = partial(attend, site, was or seam.usual)
        yield
    finally:
        with _lock:
            for layer, seam, was in reversed(before):
                if was is not None:
                    seam.by_thread[thread] = was
                else:
                    del seam.by_thread[thread]
                if not seam.by_thread:
                    del layer.attend
                    if seam.own:
                        layer.attend = seam.usual
