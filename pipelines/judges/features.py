"""Sets of pictures compared as clouds of features: Frechet distance and kernel distance, in float64.

Shapes: N real pictures, M made ones, B of a batch; D width of the features; G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load, save

from diffusion.errors import GazeError

from ..images import open_picture
from ..processes import Processes, own_device
from .interval import GROUPS, deal, of_distance
from .models import open_judge
from .verdict import Judge, Verdict

OF_RESIZING = ("size", "resample", "crop_size", "do_resize", "do_center_crop")
NEEDED = "a network with pooled features, such as a CLIP, a DINOv2 or a ResNet"
Features = Callable[[Sequence[Image.Image]], np.ndarray]


def feature_network(name: str, dtype: str = "float32") -> tuple[Features, dict[str, Any]]:
    """What makes features_BD (float64) of pictures, and the settings that they belong to.

    They are the network's pooled output: `pooler_output`, or of one that embeds texts too (CLIP, SigLIP) the picture's
    embedding, at its own length. The network's own processor resizes, by Pillow; how is among the settings.
    Raises GazeError when it cannot be opened; the features do when it pools nothing.
    """
    network, prepare = open_judge(name, NEEDED, processor="AutoImageProcessor", dtype=dtype)
    look = getattr(network, "get_image_features", network)

    @torch.inference_mode()
    def features(images: Sequence[Image.Image]) -> np.ndarray:
        inputs = prepare(images=[*images], return_tensors="pt")
        pooled = getattr(look(**inputs.to(network.device, network.dtype)), "pooler_output", None)
        if pooled is None:
            raise GazeError(f"{name} is {type(network).__name__}, and {NEEDED} is needed", "another one with --judge")
        return pooled.flatten(1).double().cpu().numpy()

    about = {key: value for key, value in prepare.to_dict().items() if key in OF_RESIZING and value is not None}
    if "resample" in about:
        about["resample"] = Image.Resampling(about["resample"]).name.lower()
    return features, {"judge": name, "network": type(network).__name__, **about, "judge_dtype": dtype}


def enough(kind: str, real_N: int, made_M: int, width: int) -> None:
    """Raises GazeError when a set is too small; to be called before the pictures are drawn.

    A covariance of width D has full rank from D + 1 features on, also when one of the 20 groups is left out for the
    interval. A kernel distance has no such limit, but needs groups of two.
    """
    ranked = -(-(width + 1) * GROUPS // (GROUPS - 1))
    fewest, least = min(real_N, made_M), max(GROUPS, ranked) if kind == "fid" else 2 * GROUPS
    if fewest < least:
        what = f"a covariance of {width} features" if kind == "fid" else f"the interval of {kind}"
        others = "; or gaze evaluate kid, or a network with fewer features" if kind == "fid" else ""
        raise GazeError(
            f"{fewest} {'made' if made_M == fewest else 'real'} pictures are too few for {what}",
            f"at least {least}, real and made{others}",
        )


def distance_of(kind: str, real_ND: np.ndarray, made_MD: np.ndarray, seed: int = 0) -> Callable[[np.ndarray], float]:
    """The distance of a kind, "fid" or "kid", for `interval.of_distance`; the seed deals the pictures into groups.

    Raises GazeError when a set is too small.
    """
    enough(kind, len(real_ND), len(made_MD), real_ND.shape[1])
    real_N, made_M = deal(len(real_ND), seed), deal(len(made_MD), seed + 1)
    if kind == "fid":
        return lambda kept_G: frechet(real_ND[kept_G[real_N]], made_MD[kept_G[made_M]])
    real, made = ([each[dealt == group] for group in range(GROUPS)]
                  for each, dealt in ((real_ND, real_N), (made_MD, made_M)))  # fmt: skip
    return kernel_distance_of(real, made)


def compare(kind: str, real_ND: np.ndarray, made_MD: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """score, low, high of `distance_of`, and n: how many were made. A Frechet distance, and its interval, ends at 0."""
    found = of_distance(distance_of(kind, real_ND, made_MD, seed))
    least = 0.0 if kind == "fid" else -np.inf
    return {**found, "low": max(least, found["low"]), "n": len(made_MD)}


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


def collect_real(
    processes: Processes, files: Sequence[str], features: Features, batch_size: int, advance: Callable[..., None]
) -> np.ndarray:
    """real_ND of these pictures, in all processes, each of which looks at its part."""
    part, mine = processes.part(len(files)), []
    at_once = 1 if own_device().type == "cpu" else batch_size
    for start in range(part.start, part.stop, at_once):
        advance((start - part.start) / len(part), f"real picture {start + 1}/{len(files)}")
        mine.append(features([open_picture(file) for file in files[start : min(start + at_once, part.stop)]]))
    count = processes.count
    return joined(processes.share(count, [joined(mine)], pack_features, unpack_features, "real"))


def nearest_judge(features: Features, real_ND: np.ndarray, files: Sequence[str], made: list[np.ndarray]) -> Judge:
    """A judge that says how far a picture is from the nearest real one in the space of features: the score is less than
    0, and 0 for a picture that is a real one. It leaves each picture's features in `made`."""
    squares_N = (real_ND**2).sum(1)

    def judge(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Verdict]:
        found_BD = features(images)
        made.append(found_BD)
        places_B = (squares_N - 2 * found_BD @ real_ND.T).argmin(1)
        far_B = np.linalg.norm(found_BD - real_ND[places_B], axis=1)
        return [Verdict(-far, {"nearest": files[place]}) for far, place in zip(far_B.tolist(), places_B, strict=True)]

    return judge


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The features of all parts but the empty ones, which do not know their width."""
    return np.concatenate([part for part in parts if len(part)] or [np.zeros((0, 0))])


def pack_features(features_ND: np.ndarray) -> bytes:
    """For another process."""
    return save({"features": np.ascontiguousarray(features_ND)})


def unpack_features(data: bytes) -> np.ndarray:
    """What `pack_features` was given."""
    return load(data)["features"]
