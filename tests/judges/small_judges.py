"""Small random models that judge, as folders that transformers' save_pretrained writes."""

from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.utils.logging import disable_progress_bar

from tests.small_pipeline import tokenizer

SIDE, LONGEST, WIDTH = 32, 40, 16
BODY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**BODY, "image_size": SIDE, "patch_size": 8}
SIZE = {"height": SIDE, "width": SIDE}


def words():
    made = tokenizer()
    made.model_max_length = LONGEST
    return made


def images():
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE)


def text_config():
    ids = {name: getattr(words(), name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**BODY, **ids, "vocab_size": len(words()), "max_position_embeddings": LONGEST}


def lively(make):
    """A network with wide random weights, so that what it says depends on what it is shown."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = make()
        for weight in network.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.25)
    return network


def saved(folder, *parts):
    disable_progress_bar()  # it would be taken for what a command says
    for part in parts:
        part.save_pretrained(folder)
    return folder


def clip(folder: Path) -> Path:
    config = CLIPConfig(text_config=text_config(), vision_config=VISION, projection_dim=WIDTH)
    return saved(folder, lively(lambda: CLIPModel(config)), CLIPProcessor(images(), words()))


def siglip(folder: Path) -> Path:
    config = SiglipConfig(text_config=text_config(), vision_config=VISION)
    network = lively(lambda: SiglipModel(config))
    with torch.no_grad():
        network.logit_scale.fill_(1.5)
        network.logit_bias.fill_(-2.0)
    return saved(folder, network, SiglipProcessor(SiglipImageProcessorPil(size=SIZE), words()))


def dinov2(folder: Path) -> Path:
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=8, mlp_ratio=2
    )
    return saved(folder, lively(lambda: Dinov2Model(config)), images())


def resnet(folder: Path) -> Path:
    """With a head that is not asked."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, WIDTH], depths=[1, 1], layer_type="basic", num_labels=3)
    return saved(folder, lively(lambda: ResNetForImageClassification(config)), images())


def without_pooler(folder: Path) -> Path:
    """As published classifiers are: their body has a pooler, of which there are no weights."""
    return saved(folder, lively(lambda: ViTForImageClassification(ViTConfig(**VISION))), images())
