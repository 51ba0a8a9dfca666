"""What transformers' models answer when they are asked about a picture: those of visual question answering and those
that turn pictures and texts into text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .vqa import Answer, Ask

LISTED = "{question} Answer with one of these: {choices}."


def classifier(model: Any, processor: Any) -> Ask:
    """Asks a model that has a fixed list of answers, such as ViLT; it says each with a probability of its own."""
    labels = {label.strip().lower(): number for number, label in model.config.id2label.items()}

    @torch.inference_mode()
    def ask(picture: Image.Image, question: str, choices: Sequence[str]) -> Answer:
        known = {choice: labels[choice.lower()] for choice in choices if choice.lower() in labels}
        if not known:
            return Answer(None, 0.0)
        inputs = processor(images=picture, text=question, truncation=True, return_tensors="pt")
        scores = model(**inputs.to(model.device, model.dtype)).logits[0].float().sigmoid()
        best = max(known, key=lambda choice: scores[known[choice]])
        return Answer(best, float(scores[known[best]]))

    return ask


def writer(model: Any, processor: Any, listed: bool, around: str | None = None) -> Ask:
    """Asks a model that writes: at each step it may only go on with a choice, and takes the most likely token. Each
    choice is tried as it stands and with a capital, with and without a space before it. The probability is that of the
    tokens written, among all tokens.

    listed: names the choices in the question, if there are several. around: text with {question}, for a model without
    a chat template; None: the question alone.
    """
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    template = "{question}" if around is None else around
    chats = around is None and getattr(processor, "chat_template", None) is not None

    def read(picture: Image.Image, question: str) -> Any:
        if not chats:
            text = template.replace("{question}", question)
            return processor(images=picture, text=text, return_tensors="pt")
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
        if listed and len(choices) > 1:
            question = LISTED.format(question=question, choices=", ".join(choices))
        forms = {tuple(_ids(tokenizer, form)): choice for choice in choices for form in _forms(choice)}
        steps = max(map(len, forms))
        restrict = _Restrict([[*form, end] for form in forms])
        out = model.generate(
            **read(picture, question).to(model.device, model.dtype),
            max_new_tokens=steps,
            do_sample=False,
            num_beams=1,
            logits_processor=[restrict],
            output_logits=True,
            return_dict_in_generate=True,
        )
        written = (*restrict.written, end)
        form = next(form for form in forms if written[: len(form) + 1] == (*form, end))
        chances = [float(logits_1V[0].float().softmax(0)[token]) for logits_1V, token in zip(out.logits, form)]
        return Answer(forms[form], math.prod(chances))

    return ask
