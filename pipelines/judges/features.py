"""Sets of pictures compared as clouds of features: Frechet distance and kernel distance, in float64.

Shapes: N real pictures, M made ones, B of a batch; D width of the features; G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion.errors import GazeError

from ..images import to_rgb
from .interval import GROUPS, deal
from .models import open_judge

OF_RESIZING = ("size", "resample", "crop_size", "do_resize", "do_center_crop")
Features = Callable[[Sequence[Image.Image]], np.ndarray]


def feature_network(name: str, dtype: str = "float32") -> tuple[Features, dict[str, Any]]:
    """What makes features_BD (float64) of pictures, and the settings that they belong to.

    They are the network's pooled output: `pooler_output`, or of one that embeds texts too (CLIP, SigLIP) the picture's
    embedding, at its own length. The network's own processor resizes, by Pillow; how is among the settings.
    Raises GazeError when it cannot be opened; the features do when it pools nothing.
    """
    from transformers import AutoImageProcessor, AutoModel

    network, prepare = open_judge(name, AutoModel, AutoImageProcessor, dtype)
    look = getattr(network, "get_image_features", network)

    @torch.inference_mode()
    def features(images: Sequence[Image.Image]) -> np.ndarray:
        inputs = prepare(images=[to_rgb(image) for image in images], return_tensors="pt")
        pooled = getattr(look(**inputs.to(network.device, network.dtype)), "pooler_output", None)
        if pooled is None:
            raise GazeError(f"{name} is {type(network).__name__}, which pools nothing", "a CLIP, DINOv2 or ResNet")
        return pooled.flatten(1).double().cpu().numpy()

    about = {key: value for key, value in prepare.to_dict().items() if key in OF_RESIZING}
    return features, {"judge": name, "network": type(network).__name__, **about, "judge_dtype": dtype}


def distance_of(kind: str, real_ND: np.ndarray, made_MD: np.ndarray, seed: int = 0) -> Callable[[np.ndarray], float]:
    """The distance of a kind, "fid" or "kid", for `interval.of_distance`; the seed deals the pictures into groups.

    Raises GazeError when a set is too small: a covariance of width D has full rank from D + 1 features on, and of a
    group of two a kernel distance can still be taken without any other.
    """
    width, fewest = real_ND.shape[1], min(len(real_ND), len(made_MD))
    least = -(-(width + 1) * GROUPS // (GROUPS - 1)) if kind == "fid" else 2 * GROUPS
    if fewest < least:
        where = "made" if len(made_MD) == fewest else "real"
        why = f"{kind} with {width} features" if kind == "fid" else f"the interval of {kind}"
        other = ", or gaze evaluate kid, or a network with fewer features" if kind == "fid" else ""
        raise GazeError(f"{fewest} {where} pictures are too few for {why}", f"at least {least} of both{other}")
    real_N, made_M = deal(len(real_ND), seed), deal(len(made_MD), seed + 1)
    if kind == "kid":
        return kernel_distance_of(
            *(
                [each[groups == group] for group in range(GROUPS)]
                for each, groups in ((real_ND, real_N), (made_MD, made_M))
            )
        )
    return lambda kept_G: frechet(real_ND[kept_G[real_N]], made_MD[kept_G[made_M]])


def frechet(real_ND: np.ndarray, made_MD: np.ndarray) -> float:
    """Squared Frechet distance of two normal distributions with these features' means and covariances (Dowson & Landau
    1982; Heusel et al. 2017): |m - m'|^2 + tr(C) + tr(C') - 2 tr((C C')^(1/2)).

    With centred features Q R, C is R^T R / (N - 1), so that the last trace is the sum of the singular values of R R'^T
    over the root of (N - 1) (M - 1): no covariance is squared, and no root taken of what rounding left below 0.
    """
    means, roots = [], []
    for features_ND in (real_ND, made_MD):
        means.append(features_ND.mean(0))
        roots.append(np.linalg.qr(features_ND - means[-1], mode="r") / np.sqrt(len(features_ND) - 1))
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    apart = ((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * shared
    return max(0.0, float(apart))  # of equal sets rounding can leave less


def kernel_distance_of(real: Sequence[np.ndarray], made: Sequence[np.ndarray]) -> Callable[[np.ndarray], float]:
    """Squared maximum mean discrepancy with the kernel k(x, y) = (x.y / D + 1)^3, the mean of k over all pairs within
    each set less twice that between them; unbiased, so it can be below 0 (Gretton et al. 2012, lemma 6; Binkowski et
    al. 2018). real, made: the features of each group. Returns it as a function of the groups kept."""
    real_GG, made_GG, between_GG = _kernel_sums(real, real), _kernel_sums(made, made), _kernel_sums(real, made)
    for sums_GG, groups in ((real_GG, real), (made_GG, made)):
        # no picture is a pair with itself
        sums_GG[np.diag_indices_from(sums_GG)] -= [_kernel((each**2).sum(1), each.shape[1]).sum() for each in groups]
    sizes = [np.array([len(each) for each in groups]) for groups in (real, made)]

    def distance(kept_G: np.ndarray) -> float:
        n, m = (int(size_G[kept_G].sum()) for size_G in sizes)
        real_sum, made_sum, between = (sums[np.ix_(kept_G, kept_G)].sum() for sums in (real_GG, made_GG, between_GG))
        return float(real_sum / (n * (n - 1)) + made_sum / (m * (m - 1)) - 2 * between / (n * m))

    return distance


def _kernel_sums(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """Of every pair of groups [GG]."""
    return np.array([[_kernel(x_ND @ y_MD.T, x_ND.shape[1]).sum() for y_MD in others] for x_ND in some])


def _kernel(products: np.ndarray, width: int) -> np.ndarray:
    return (products / width + 1) ** 3
