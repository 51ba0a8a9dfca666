"""Small random models of the kinds that judges ask, each a folder as transformers writes it."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
    SwinConfig,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from tests.small_pipeline import WINDOW, tokenizer

SIDE = 32
SQUARE = {"height": SIDE, "width": SIDE}
LAYERS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
}
VISION: dict[str, Any] = {**LAYERS, "image_size": SIDE, "patch_size": 8}
WORDS = "is there a an the in picture how many what color where dog cat hot cups red blue yes no does this figure show"
# Where BERT has them, because Grounding DINO counts on that.
SPECIAL = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}


def bert() -> BertTokenizer:
    """Reads WORDS and single letters."""
    plain = iter(
        [*WORDS.split(), *"abcdefghijklmnopqrstuvwxyz0123456789", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    )
    tokens = [SPECIAL.get(number) or next(plain, f"[unused{number}]") for number in range(1030)]
    return BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, model_max_length=64)


def save(folder: Path, model: Any, processor: Any) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def clip_texts() -> dict[str, Any]:
    words = tokenizer()
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return {**LAYERS, "vocab_size": len(words), "max_position_embeddings": WINDOW, **ids}


def clip(folder: Path) -> str:
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=clip_texts(), vision_config=VISION, projection_dim=16))
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    return save(folder, model, CLIPProcessor(pictures, tokenizer()))


def owl(folder: Path, second: bool = False) -> str:
    """OWL-ViT, or OWLv2."""
    torch.manual_seed(0)
    config, kind, processor, pictures = (
        (Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor, Owlv2ImageProcessorPil(size=SQUARE))
        if second
        else (OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor, OwlViTImageProcessorPil(size=SQUARE))
    )
    model = kind(config(text_config=clip_texts(), vision_config=VISION, projection_dim=16))
    return save(folder, model, processor(pictures, tokenizer()))


def grounding_dino(folder: Path) -> str:
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIDE,
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 1, 1],
            window_size=2,
            out_features=["stage2", "stage3"],
        ),
        text_config={"model_type": "bert", **LAYERS, "vocab_size": 1030},
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=20,
        num_feature_levels=2,
        max_text_len=32,
    )
    pictures = GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    return save(folder, GroundingDinoForObjectDetection(config), GroundingDinoProcessor(pictures, bert()))


def vilt(folder: Path) -> str:
    torch.manual_seed(0)
    answers = dict(enumerate(["yes", "no", "1", "2", "3", "red", "blue"]))
    config = ViltConfig(**VISION, vocab_size=1030, id2label=answers, max_position_embeddings=64)
    pictures = ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=8)
    return save(folder, ViltForQuestionAnswering(config), ViltProcessor(pictures, bert()))


def blip(folder: Path) -> str:
    torch.manual_seed(0)
    texts = {
        **LAYERS,
        "vocab_size": 1030,
        "encoder_hidden_size": 16,
        "bos_token_id": 101,
        "sep_token_id": 102,
        "pad_token_id": 0,
    }
    model = BlipForQuestionAnswering(BlipConfig(text_config=texts, vision_config=VISION, projection_dim=16))
    return save(folder, model, BlipProcessor(BlipImageProcessorPil(size=SQUARE), bert()))


CHAT = (
    "{% for m in messages %}user: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %} assistant: "
)


def llava(folder: Path, chats: bool = True) -> str:
    torch.manual_seed(0)
    words = tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(
            **LAYERS,
            vocab_size=len(words),
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        ),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    pictures = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE)
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT if chats else None,
    )
    return save(folder, LlavaForConditionalGeneration(config), processor)
