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
    (SDXL: pooled text and the embedded picture sizes), or None for models without one."""

    context_BSE: Tensor
    vector_BV: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context_BSE)

    def expand(self, rows: int) -> "Condition":
        """A single prompt seen as `rows` equal ones, without a copy; `rows` prompts stay as they are."""
        vector = None if self.vector_BV is None else self.vector_BV.expand(rows, -1)
        return Condition(self.context_BSE.expand(rows, -1, -1), vector)

    def pick(self, rows: Sequence[int]) -> "Condition":
        """These of the prompts, in this order."""
        vector = None if self.vector_BV is None else self.vector_BV[rows]
        return Condition(self.context_BSE[rows], vector)


def join(conditions: Sequence[Condition]) -> Condition:
    """One batch out of several, in their order; all of the same S, E and V, all with a vector or none."""
    vectors = [condition.vector_BV for condition in conditions if condition.vector_BV is not None]
    return Condition(
        torch.cat([condition.context_BSE for condition in conditions]),
        torch.cat(vectors) if vectors else None,
    )
