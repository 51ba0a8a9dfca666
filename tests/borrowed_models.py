"""Small random models of transformers that write text, as folders that its save_pretrained writes."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

WORDS = ["a", "red", "apple", "on", "green", "grass", "in", "soft", "light", ",", ".", "(", ")", "[", "]", ":", "1", "2", "\\", "BREAK", "golden", "dog", "cat", "sky", "under", "tree", "of", "user", "assistant"]  # fmt: skip
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
SIDE = 32  # pixels
TEXT: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION: dict[str, Any] = {**TEXT, "image_size": SIDE, "patch_size": 16}
SIZE = {"height": SIDE, "width": SIDE}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHAT = (
    "{% for m in messages %}user {% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %} assistant"
)


def tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A word a token."""
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=["<image>"], **roles, **options)


def causal(folder: Path, **options: Any) -> Path:
    """GPT-2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        network = GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS) + len(SPECIAL), **sizes, **IDS))
    return _saved(folder, _eager(network), tokenizer(**options))


def blip(folder: Path) -> Path:
    text = {**TEXT, "encoder_hidden_size": 32, "vocab_size": len(WORDS) + len(SPECIAL), **IDS, "sep_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=VISION))
    return _saved(folder, _eager(network), BlipProcessor(BlipImageProcessorPil(size=SIZE), tokenizer()))


def git(folder: Path) -> Path:
    config = GitConfig(vision_config=VISION, vocab_size=len(WORDS) + len(SPECIAL), **TEXT, **IDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GitForCausalLM(config)
    return _saved(folder, _eager(network), GitProcessor(_clip_images(), tokenizer()))


def vit_gpt2(folder: Path) -> Path:
    """As ViT-GPT2 is published: picture and word parts lie apart."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "add_cross_attention": True, "is_decoder": True}
    decoder = GPT2Config(vocab_size=len(WORDS) + len(SPECIAL), **sizes, **IDS)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VisionEncoderDecoderModel(config)
    return _saved(folder, _eager(network), ViTImageProcessorPil(size=SIZE), tokenizer())


def llava(folder: Path) -> Path:
    """One that answers: with a chat template, and tokens for the picture among the words."""
    text = LlamaConfig(**TEXT, vocab_size=len(WORDS) + len(SPECIAL), num_key_value_heads=2, **IDS)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=SPECIAL.index("<image>")
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlavaForConditionalGeneration(config)
    options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return _saved(folder, _eager(network), LlavaProcessor(_clip_images(), tokenizer(), chat_template=CHAT, **options))


CAPTIONERS = {"blip": blip, "git": git, "vit_gpt2": vit_gpt2, "llava": llava}


def _clip_images() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE)


def _eager(network: Any) -> Any:
    """With wide random weights, so that which word is the likeliest depends on what the network was given."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.35 if "embed" not in name else 0.7)
    return network


def _saved(folder: Path, *parts: Any) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder
