"""What the prompt becomes: the input of the network that depends on words alone.

Shape letters: B batch, S tokens of the text, E width of the text embedding, V width of the pooled vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """A batch of prompts. context_BSE: one embedding per token, for cross-attention. vector_BV: one per prompt
    (SDXL: pooled text and the embedded picture sizes), or None for models without one. seen_BS: which tokens the model
    is shown, or None for all."""

    context_BSE: Tensor
    vector_BV: Tensor | None = None
    seen_BS: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context_BSE)

    def expand(self, rows: int) -> "Condition":
        """A single prompt seen as `rows` equal ones, without a copy; `rows` prompts stay as they are."""
        vector, seen = (None if each is None else each.expand(rows, -1) for each in (self.vector_BV, self.seen_BS))
        return Condition(self.context_BSE.expand(rows, -1, -1), vector, seen)

    def pick(self, rows: Sequence[int]) -> "Condition":
        """These of the prompts, in this order."""
        vector, seen = (None if each is None else each[rows] for each in (self.vector_BV, self.seen_BS))
        return Condition(self.context_BSE[rows], vector, seen)


def blank(condition: Condition, rows_B: Tensor) -> Condition:
    """The same with zeros in these rows (True): in SDXL a dropped prompt, where the vector is the pooled text alone."""
    context_BSE, vector_BV = condition.context_BSE, condition.vector_BV
    vector_BV = None if vector_BV is None else vector_BV.masked_fill(rows_B[:, None], 0)
    return Condition(context_BSE.masked_fill(rows_B[:, None, None], 0), vector_BV, condition.seen_BS)


def join(conditions: Sequence[Condition]) -> Condition:
    """One batch out of several, in their order; all of the same S, E and V, all with a vector or none, and so with
    seen."""
    contexts_BSE = [condition.context_BSE for condition in conditions]
    vectors_BV = [condition.vector_BV for condition in conditions if condition.vector_BV is not None]
    seen_BS = [condition.seen_BS for condition in conditions if condition.seen_BS is not None]
    return Condition(torch.cat(contexts_BSE), *(torch.cat(each) if each else None for each in (vectors_BV, seen_BS)))
