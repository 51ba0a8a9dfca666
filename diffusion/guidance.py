"""Two predictions into one."""

from torch import Tensor


def classifier_free(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """uncond + scale * (cond - uncond): away from the empty (or negative) prompt, towards the prompt (Ho & Salimans
    2022, eq. 6, in which scale is 1 + w). Any shape. Scale 1 is the prompt alone, 0 the empty prompt alone."""
    return uncond + scale * (cond - uncond)
