"""What transformers' zero-shot object detectors (OWL-ViT, OWLv2, Grounding DINO, ...) find in a picture, by name.

Shapes: Q boxes that a detector considers, N names, T tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError

from .detect import Find, Found
from .models import open_judge

NEEDED = "a detector that is given names, such as an OWL-ViT, an OWLv2 or a Grounding DINO,"
OWL = ("owlvit", "owlv2")
GROUNDED = ("grounding-dino", "mm-grounding-dino")  # read all names as one text, and say which tokens a box goes with


def open_detector(name: str, threshold: float = 0.0, dtype: str = "float32") -> Find:
    """What finds objects with a detector of a folder or the hub. threshold: see `detector`. Raises GazeError."""
    model, processor = open_judge(name, NEEDED, "AutoModelForZeroShotObjectDetection", dtype=dtype)
    if model.config.model_type == "owlv2" and find_spec("scipy") is None:
        raise GazeError(
            f"{name} is an OWLv2, whose pictures are resized by scipy, and that is missing", "pip install scipy"
        )
    return detector(model, processor, threshold)


def detector(model: Any, processor: Any, threshold: float = 0.0) -> Find:
    """What finds objects: a box goes to the name that fits it best, and counts from a score above `threshold` on.

    model, processor: of transformers' zero-shot object detection. GazeError: names that it cannot read at once.
    """
    grounded = model.config.model_type in GROUNDED
    read = _grounded if grounded else _by_name
    query = "a photo of a {}" if model.config.model_type in OWL else "{}"  # as each of them was trained

    @torch.inference_mode()
    def find(picture: Image.Image, names: Sequence[str]) -> dict[str, list[Found]]:
        queries = [query.format(name.replace(".", " ")) for name in names]
        # of a text with all names nothing is cut, so that one that is too long is seen
        inputs = processor(images=picture, text=[queries], truncation=not grounded, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        found: dict[str, list[Found]] = {}
        for name, box, score in read(model, processor, inputs, names, picture.size[::-1], threshold):
            found.setdefault(name, []).append(Found(box, score))
        return found

    return find


def _by_name(
    model: Any, processor: Any, inputs: Any, names: Sequence[str], size: tuple[int, int], threshold: float
) -> Iterable[tuple[str, Any, float]]:
    """Name, box and score of what is found, by the processor's own reading."""
    (found,) = processor.post_process_grounded_object_detection(
        model(**inputs), threshold=threshold, target_sizes=[size], text_labels=[list(names)]
    )
    return zip(found["text_labels"], map(tuple, found["boxes"].tolist()), found["scores"].tolist(), strict=True)


def _grounded(
    model: Any, processor: Any, inputs: Any, names: Sequence[str], size: tuple[int, int], threshold: float
) -> Iterable[tuple[str, Any, float]]:
    """The same where a box has a score for each token: a name's is the mean over its tokens, as in the evaluation of
    Grounding DINO's authors (Liu et al. 2023). The processor's reading would join tokens of several names."""
    limit = model.config.max_text_len
    if inputs["input_ids"].shape[1] > limit:
        problem = f"{len(names)} names are more than the {limit} tokens that this detector reads at once"
        raise GazeError(problem, "--only-asked, which looks for the names of one prompt at a time")
    outputs = model(**inputs)
    (every,) = processor.post_process_grounded_object_detection(
        outputs, inputs["input_ids"], threshold=-1.0, text_threshold=1.0, target_sizes=[size]
    )
    spans_TN = _spans(inputs["input_ids"][0], processor.tokenizer, len(names))
    scores_QN = outputs.logits[0, :, : len(spans_TN)].float().sigmoid() @ spans_TN
    best_Q, name_Q = scores_QN.max(dim=1)
    rows = zip(name_Q.tolist(), every["boxes"].tolist(), best_Q.tolist(), strict=True)
    return [(names[number], tuple(box), score) for number, box, score in rows if score > threshold]


def _spans(ids_T: Tensor, tokenizer: Any, count: int) -> Tensor:
    """[T, N]: the share of each token in the name it belongs to; names end with a full stop."""
    stop = ids_T == tokenizer.convert_tokens_to_ids(".")
    word = ~stop & (ids_T != tokenizer.cls_token_id) & (ids_T != tokenizer.sep_token_id)
    of_T = stop.cumsum(0)
    spans_TN = (of_T[:, None] == torch.arange(count, device=ids_T.device)) & word[:, None]
    return spans_TN.float() / spans_TN.sum(dim=0).clamp(min=1)
