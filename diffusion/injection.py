"""The attention of one picture in the place of another's (prompt-to-prompt, Hertz et al. 2022, section 3).

The two are drawn in one batch: of its rows every even one is the source's and the one after it the target's, negative
prompts first. Weights are never written out: as out = weights v, all that is done to the weights' columns can be done
to the rows of v, so the layer's own kernel does the rest.
"""

# Shapes: R rows, L heads, N tokens of the picture, S tokens of the text, D width of a head.

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .alignment import Alignment
from .attention_sites import Site

Attend = Callable[..., Tensor]


def source_of_all(x: Tensor) -> Tensor:
    """Each target's row replaced by its source's."""
    return x[::2].repeat_interleave(2, dim=0)


def source_of_last(x: Tensor) -> Tensor:
    """The last row, the target's with its own prompt, replaced by the source's."""
    return torch.cat([x[:-1], x[-2:-1]])


def inject_self(site: Site, usual: Attend, q_RLND: Tensor, k_RLND: Tensor, v_RLND: Tensor) -> Tensor:
    """Pixels of the target look where those of the source do. Also for the negative prompt, because before text first
    enters both predictions are one computation."""
    return usual(source_of_all(q_RLND), source_of_all(k_RLND), v_RLND)


def inject_cross(alignment: Alignment, scale_S: Tensor) -> Attend:
    """What stands in for attention to the text: the target's words get the share that their words in the source have,
    added words keep their own. scale_S: on the target's shares, afterwards; their sum is then another, as it is where
    words are added or left out.
    """
    added_S = alignment.added_S * scale_S
    given_SS = alignment.given_SS * scale_S

    def attend(site: Site, usual: Attend, q_RLND: Tensor, k_RLSD: Tensor, v_RLSD: Tensor, *bias_R11S: Tensor) -> Tensor:
        values_RLSD = torch.cat([v_RLSD[:-1], given_SS.to(v_RLSD) @ v_RLSD[-1:]])
        looks = (source_of_last(each) for each in (q_RLND, k_RLSD))
        out_RLND = usual(*looks, values_RLSD, *map(source_of_last, bias_R11S))
        if not added_S.any():
            return out_RLND
        own_1LSD = added_S.to(v_RLSD)[:, None] * v_RLSD[-1:]
        own_1LND = usual(q_RLND[-1:], k_RLSD[-1:], own_1LSD, *(bias[-1:] for bias in bias_R11S))
        return torch.cat([out_RLND[:-1], out_RLND[-1:] + own_1LND])

    return attend
