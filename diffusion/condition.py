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
    (SDXL: pooled text and the embedded picture sizes), or None for models without one. weight_BS: what each token's
    share of the attention is multiplied by, before the shares are brought back to a sum of 1; 0 (False) hides it, and
    None is 1 (True) for all."""

    context_BSE: Tensor
    vector_BV: Tensor | None = None
    weight_BS: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context_BSE)

    def expand(self, rows: int) -> "Condition":
        """A single prompt seen as `rows` equal ones, without a copy; `rows` prompts stay as they are."""
        vector, weight = (None if each is None else each.expand(rows, -1) for each in (self.vector_BV, self.weight_BS))
        return Condition(self.context_BSE.expand(rows, -1, -1), vector, weight)

    def pick(self, rows: Sequence[int]) -> "Condition":
        """These of the prompts, in this order."""
        vector, weight = (None if each is None else each[rows] for each in (self.vector_BV, self.weight_BS))
        return Condition(self.context_BSE[rows], vector, weight)


def blank(condition: Condition, rows_B: Tensor) -> Condition:
    """The same with zeros in these rows (True): in SDXL a dropped prompt, where the vector is the pooled text alone."""
    context_BSE, vector_BV = condition.context_BSE, condition.vector_BV
    vector_BV = None if vector_BV is None else vector_BV.masked_fill(rows_B[:, None], 0)
    return Condition(context_BSE.masked_fill(rows_B[:, None, None], 0), vector_BV, condition.weight_BS)


def join(conditions: Sequence[Condition]) -> Condition:
    """One batch out of several, in their order; all of the same S, E and V, all with a vector or none. Those without
    weights among others have 1 for each token."""
    context_BSE = torch.cat([condition.context_BSE for condition in conditions])
    vectors_BV = [condition.vector_BV for condition in conditions if condition.vector_BV is not None]
    given = next((condition.weight_BS for condition in conditions if condition.weight_BS is not None), None)
    weight_BS = None
    if given is not None:
        weights_BS = [
            given.new_ones(condition.context_BSE.shape[:2]) if condition.weight_BS is None else condition.weight_BS
            for condition in conditions
        ]
        weight_BS = torch.cat(weights_BS)
    return Condition(context_BSE, torch.cat(vectors_BV) if vectors_BV else None, weight_BS)
