"""What transformers' models answer when they are asked about a picture: those of visual question answering and those
that turn pictures and text into text.

Shapes: S tokens so far, V tokens of the vocabulary; one picture and question at a time, so that none is padded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffusion.errors import GazeError
from diffusion.files import read_json
from diffusion.hub import TRANSFORMERS, local_path

from .models import open_judge
from .vqa import Answer, Ask

NEEDED = "a model that answers questions about a picture, or writes text about one,"
QUESTION = "{question}"
WITH_PICTURE = '--around with its mark of a picture, such as "USER: <image> {question} ASSISTANT:"'
LISTED = "{question} Answer with one of these: {choices}."


def open_asker(name: str, around: str | None = None, dtype: str = "float32") -> Ask:
    """What asks a model of a folder or the hub. around: see `writer`. Raises GazeError, also for an `around` that the
    model would not read."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES as ANSWERING

    config = local_path(name, TRANSFORMERS) / TRANSFORMERS.main
    trained = read_json(config).get("architectures") if config.is_file() else None
    answers = bool({*(trained or [])} & {*ANSWERING.values()})  # the type does not tell: BLIP comes in both kinds
    auto = "AutoModelForVisualQuestionAnswering" if answers else "AutoModelForImageTextToText"
    model, processor = open_judge(name, NEEDED, auto, dtype=dtype)
    if not model.can_generate():
        if around is not None:
            raise GazeError(f"{name} has a list of answers and reads the question alone", "without --around")
        return classifier(model, processor)
    return writer(model, processor, list_choices=not answers, around=around)


def classifier(model: Any, processor: Any) -> Ask:
    """Asks a model that knows a fixed list of answers, such as ViLT (Kim et al. 2021), where each has a probability of
    its own."""
    labels = {label.strip().lower(): number for number, label in model.config.id2label.items()}
    longest = min(processor.tokenizer.model_max_length, model.config.max_position_embeddings)

    @torch.inference_mode()
    def ask(picture: Image.Image, question: str, choices: Sequence[str]) -> Answer:
        known = {choice: labels[choice.lower()] for choice in choices if choice.lower() in labels}
        if not known:
            return Answer(None, 0.0)
        inputs = processor(images=picture, text=question, truncation=True, max_length=longest, return_tensors="pt")
        chances_V = model(**inputs.to(model.device, model.dtype)).logits[0].float().sigmoid()
        best = max(known, key=lambda choice: chances_V[known[choice]])
        cut = len(processor.tokenizer(question).input_ids) > longest
        return Answer(best, float(chances_V[known[best]]), cut)

    return ask


def writer(model: Any, processor: Any, list_choices: bool, around: str | None = None) -> Ask:
    """Asks a model that writes. It may write nothing but one of the choices: at each step it takes the most likely of
    the tokens that go on with one. A choice may begin with a capital, and with a space. The probability is that of the
    tokens written, among all tokens; the end of the answer does not count.

    list_choices: says in the question what there is to choose from. around: a text with {question}, for a model that
    has no chat template or should not use it. GazeError: it has no {question}; later, a question that is too long.
    """
    if around is not None and QUESTION not in around:
        raise GazeError(f"{around!r:.200} has no place for the question", '"Question: {question} Answer:"')
    tokenizer = processor.tokenizer
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # T5 has no such limit
    chats = around is None and getattr(processor, "chat_template", None) is not None
    template = around or QUESTION

    def read(picture: Image.Image, question: str) -> Any:
        if not chats:
            text = template.replace(QUESTION, question)
            try:
                return processor(images=picture, text=text, return_tensors="pt")
            except ValueError as error:  # the mark of a picture is missing, or there are several
                raise GazeError(f"this model does not read {text!r:.300}: {error}", WITH_PICTURE) from None
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )

    @torch.inference_mode()
    def ask(picture: Image.Image, question: str, choices: Sequence[str]) -> Answer:
        if list_choices and len(choices) > 1:
            question = LISTED.format(question=question, choices=", ".join(choices))
        for mark in marks:  # a prompt may hold what stands for a picture, or ends a message
            question = question.replace(mark, "")
        ends = {(*ids, end): choice for choice in choices for ids in _spellings(tokenizer, choice)}
        inputs, written = read(picture, question).to(model.device, model.dtype), list[int]()
        length = inputs["input_ids"].shape[1]
        if longest is not None and length > longest:
            problem = f"{length} tokens are more than the {longest} that this model reads: {question!r:.200}"
            raise GazeError(problem, "a shorter prompt, or another model with --judge")
        out = model.generate(
            **inputs,
            max_new_tokens=max(map(len, ends)) - 1,
            logits_processor=[_only(ends, written)],
            repetition_penalty=1.0,  # some models' own files ask for another, which would tell on the listed choices
            output_logits=True,
            return_dict_in_generate=True,
        )
        answer = next(ids for ids in ends if (*written, end)[: len(ids)] == ids)
        chances_1V = [logits_1V.float().softmax(1) for logits_1V in out.logits]
        probability = math.prod(float(chances_1V[step][0, token]) for step, token in enumerate(answer[:-1]))
        return Answer(ends[answer], probability)

    return ask


def _spellings(tokenizer: Any, choice: str) -> list[tuple[int, ...]]:
    """The tokens of a choice as it may stand in an answer."""
    texts = [space + text for text in (choice, choice[:1].upper() + choice[1:]) for space in ("", " ")]
    return [tuple(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


def _only(answers: Collection[tuple[int, ...]], written: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """For `generate`: lets it write only one of the answers. written: receives the tokens."""

    def restrict(ids_1S: Tensor, scores_1V: Tensor) -> Tensor:
        step = len(written)
        following = sorted({ids[step] for ids in answers if len(ids) > step and [*ids[:step]] == written})
        written.append(following[int(scores_1V[0, following].argmax())] if following else written[-1])
        return torch.full_like(scores_1V, -math.inf).index_fill_(1, scores_1V.new_tensor([written[-1]]).long(), 0.0)

    return restrict
