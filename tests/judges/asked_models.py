"""Small random models of the kinds that judges ask, each a folder as transformers writes it."""

from pathlib import Path

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipProcessor,
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
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil

from tests.judges.small_judges import BODY, SIDE, SIZE, VISION, WIDTH, images, lively, saved, text_config, words

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


def owl(folder: Path, second: bool = False) -> Path:
    """OWL-ViT, or OWLv2."""
    kinds = (
        (Owlv2Config, Owlv2ForObjectDetection, Owlv2Processor, Owlv2ImageProcessorPil)
        if second
        else (OwlViTConfig, OwlViTForObjectDetection, OwlViTProcessor, OwlViTImageProcessorPil)
    )
    config, network, processor, pictures = kinds
    sizes = config(text_config=text_config(), vision_config=VISION, projection_dim=BODY["hidden_size"])
    return saved(folder, lively(lambda: network(sizes)), processor(pictures(size=SIZE), words()))


def grounding_dino(folder: Path) -> Path:
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=SIDE,
            embed_dim=8,
            depths=[1, 1, 1],
            num_heads=[1, 1, 1],
            window_size=2,
            out_features=["stage2", "stage3"],
        ),
        text_config={"model_type": "bert", **BODY, "vocab_size": 1030, "initializer_range": 0.5},
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GroundingDinoForObjectDetection(config)  # `lively` would make all scores 0 or 1
    return saved(folder, network, GroundingDinoProcessor(pictures, bert()))


def vilt(folder: Path) -> Path:
    answers = dict(enumerate(["yes", "no", "1", "2", "3", "red", "blue"]))
    config = ViltConfig(**VISION, vocab_size=1030, id2label=answers, max_position_embeddings=64)
    pictures = ViltImageProcessorPil(size={"shortest_edge": SIDE}, size_divisor=8)
    return saved(folder, lively(lambda: ViltForQuestionAnswering(config)), ViltProcessor(pictures, bert()))


def blip(folder: Path) -> Path:
    ids = {"bos_token_id": 101, "sep_token_id": 102, "pad_token_id": 0}
    texts = {**BODY, **ids, "vocab_size": 1030, "encoder_hidden_size": BODY["hidden_size"]}
    config = BlipConfig(text_config=texts, vision_config=VISION, projection_dim=WIDTH)
    processor = BlipProcessor(BlipImageProcessorPil(size=SIZE), bert())
    return saved(folder, lively(lambda: BlipForQuestionAnswering(config)), processor)


CHAT = (
    "{% for m in messages %}user: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}{% endfor %} assistant: "
)


def llava(folder: Path, chats: bool = True) -> Path:
    tokenizer = words()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**BODY, **ids, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    processor = LlavaProcessor(
        images(),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT if chats else None,
    )
    return saved(folder, lively(lambda: LlavaForConditionalGeneration(config)), processor)
