"""Judges that ask questions: which are asked, what is made of the answers, and what models answer, small random ones:
against the same weights asked one token at a time."""

import json
import math
from random import Random

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    BlipForQuestionAnswering,
    LlavaForConditionalGeneration,
    ViltForQuestionAnswering,
)

from diffusion.errors import GazeError
from pipelines.judges.answers import NEEDED, open_asker, writer
from pipelines.judges.everyday import everyday
from pipelines.judges.facts import facts_of
from pipelines.judges.interval import of_share
from pipelines.judges.models import open_judge
from pipelines.judges.questions import Question, questions_of, read_questions
from pipelines.judges.verdict import Verdict
from pipelines.judges.vqa import Answer, tifa_judge, tifa_summary, vqascore_judge
from tests.judges import asked_models, small_judges

PICTURE = Image.new("RGB", (48, 32), "white")
TRUTH = ("yes", "no")
TEN = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")


def asked_of(**facts):
    return questions_of(facts_of("x", facts))


def test_questions_of_facts():
    cat, dog = {"class": "cat", "count": 1}, {"class": "dog", "count": 1}
    there = Question("Is there a cat in the picture?", TRUTH, "yes", "object")
    assert asked_of(include=[cat]) == [there]
    assert asked_of(include=[{"class": "owl", "count": 3}], exclude=[{"class": "owl", "count": 4}]) == [
        Question("Is there an owl in the picture?", TRUTH, "yes", "object"),
        Question("How many owls are in the picture?", ("2", "3", "4", "5"), "3", "counting"),
    ]
    limited = asked_of(include=[cat], exclude=[{"class": "cat", "count": 2}])
    assert limited[1:] == [Question("How many cats are in the picture?", ("1", "2", "3", "4"), "1", "counting")]
    assert asked_of(include=[cat | {"color": "red"}])[1:] == [Question("What color is the cat?", TEN, "red", "color")]
    (*_, colour) = asked_of(include=[{"class": "cat", "count": 2, "color": "grey"}])
    assert colour == Question("What color are the cats?", (*TEN, "grey"), "grey", "color")
    assert asked_of(include=[cat, dog | {"position": ["left of", 0]}]) == [
        there,
        Question("Is there a dog in the picture?", TRUTH, "yes", "object"),
        Question("Is the dog to the left of the cat?", TRUTH, "yes", "spatial"),
        Question("Where is the dog, seen from the cat?", ("left", "right", "above", "below"), "left", "spatial"),
    ]


def test_every_prompt_of_ours_has_questions():
    for index in range(120):
        entry = everyday(index)
        questions = questions_of(facts_of(entry["prompt"], entry))
        assert all(each.answer in each.choices for each in questions)
        kinds = {each.kind for each in questions}
        more = {"counting": {"counting"}, "position": {"spatial"}, "colors": {"color"}, "color_attr": {"color"}}
        assert kinds == {"object"} | more.get(entry["tag"], set())


def test_questions_of_a_file(tmp_path):
    listed = {"question": "what color is it?", "choices": ["red", "blue"], "answer": "red", "element_type": "color"}
    tifa = [
        {"id": "1", "caption": "a red cup", **listed},
        {"id": "1", "caption": "a red cup", "question": "is it a cup?", "answer": "yes", "choices": ["yes", "no"]},
    ]
    ours = {"prompt": "a red cup", "questions": [listed, {"question": "is it a cup?", "answer": "yes"}]}
    expected = [
        Question("what color is it?", ("red", "blue"), "red", "color"),
        Question("is it a cup?", TRUTH, "yes", "all"),
    ]
    for name, text in (("a.json", json.dumps(tifa)), ("b.jsonl", json.dumps(ours) + "\n\n")):
        (tmp_path / name).write_text(text)
        assert read_questions(str(tmp_path / name)) == {"a red cup": expected}


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "holds no question"),
        ("[]", "holds no question"),
        ("{", "cannot be read"),
        ("3", "entry 1: 3 is no JSON object"),
        ('{"question": "is it?", "answer": "yes"}', "entry 1 has no prompt with questions"),
        ('{"prompt": "x", "questions": []}', "entry 1 has no prompt with questions"),
        ('{"prompt": "x", "question": "is it?"}', "is no question with an answer"),
        ('{"prompt": "x", "questions": [3]}', "is no question with an answer"),
        ('{"prompt": "x", "question": "is it?", "choices": 3, "answer": "yes"}', "is no question with an answer"),
        (
            '{"prompt": "x", "question": "is it?", "answer": "maybe"}',
            "the answer 'maybe' to 'is it.' is none of its choices",
        ),
    ],
)
def test_bad_questions_are_named(tmp_path, text, says):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(GazeError, match=says):
        read_questions(str(tmp_path / "q.jsonl"))
    with pytest.raises(GazeError, match="cannot be read"):
        read_questions(str(tmp_path / "none.jsonl"))


# The judges


def test_tifa_is_the_share_of_right_answers():
    questions = [Question(text, ("red", "blue"), "red", "color") for text in "abc"]
    answers = {"a": Answer("red", 0.5), "b": Answer("blue", 0.25), "c": Answer(None, 0.0)}
    (verdict,) = tifa_judge(lambda _, question, __: answers[question], {"x": questions})(["x"], [PICTURE])
    assert verdict.score == pytest.approx(1 / 3)
    assert verdict.said["questions"][1] == {
        "question": "b",
        "choices": ("red", "blue"),
        "answer": "red",
        "kind": "color",
        "said": "blue",
        "probability": 0.25,
        "right": False,
        "cut": False,
    }
    assert json.loads(json.dumps(verdict.said))
    with pytest.raises(GazeError, match="there are no questions about 'y'"):
        tifa_judge(lambda *_: Answer("red", 1.0), {"x": questions})(["y"], [PICTURE])


def test_the_interval_of_a_kind_of_question_is_that_of_as_many_pictures():
    """Nine questions about one picture tell no more of other pictures than one does."""
    few, many = [{"kind": "object", "right": True}], [{"kind": "object", "right": False}] * 8
    more = [*many, {"kind": "color", "right": True}]
    found = tifa_summary([Verdict(1.0, {"questions": few})] * 8 + [Verdict(1 / 9, {"questions": more})] * 2)
    assert [*found["skills"]] == ["color", "object"]
    assert found["skills"]["color"] == of_share(1.0, 2)
    assert found["skills"]["object"] == of_share(8 / 24, 10)
    assert (found["score"], found["n"]) == (pytest.approx((8 + 2 / 9) / 10), 10)


def test_vqascore_is_the_probability_of_yes():
    asked = []

    def ask(_, question, choices):
        asked.append((question, choices))
        return Answer("Yes", 0.75)

    (verdict,) = vqascore_judge(ask)(["a {red} cup"], [PICTURE])
    assert verdict.score == 0.75
    assert asked == [('Does this figure show "a {red} cup"? Please answer yes or no.', ["Yes"])]
    with pytest.raises(GazeError, match="does not ask for the prompt"):
        vqascore_judge(ask, "Is it good?")
    with pytest.raises(GazeError, match="cannot answer 'Yes'"):
        vqascore_judge(lambda *_: Answer(None, 0.0))(["x"], [PICTURE])


# Models


@pytest.fixture(scope="module")
def picture():
    random = Random(4)
    return Image.frombytes("RGB", (40, 30), bytes(random.randrange(256) for _ in range(40 * 30 * 3)))


def test_a_model_with_a_list_of_answers(tmp_path, picture):
    folder = asked_models.vilt(tmp_path)
    ask, question = open_asker(folder), "is there a dog?"
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        logits = ViltForQuestionAnswering.from_pretrained(folder)(
            **processor(images=picture, text=question, return_tensors="pt")
        ).logits[0]
    chances = dict(
        zip(["yes", "no", "1", "2", "3", "red", "blue"], [1 / (1 + math.exp(-x)) for x in logits.tolist()], strict=True)
    )
    for choices in (["yes", "no"], ["1", "2", "3", "4"], ["Red", "polar bear"]):
        known = [choice for choice in choices if choice.lower() in chances]
        best = max(known, key=lambda choice: chances[choice.lower()])
        assert ask(picture, question, choices) == Answer(best, pytest.approx(chances[best.lower()], abs=1e-5))
    assert ask(picture, question, ["polar bear"]) == Answer(None, 0.0)
    assert vqascore_judge(ask)(["dog"], [picture])[0].score <= 1


def test_a_question_that_is_too_long_is_said_to_be_cut_or_refused(tmp_path, picture):
    folder = asked_models.vilt(tmp_path / "vilt")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 10**30}))
    judge = vqascore_judge(open_asker(folder))
    short, long = judge(["dog", "dog " * 100], [picture] * 2)
    assert (short.said["cut"], long.said["cut"]) == (False, True)
    ask = open_asker(asked_models.blip(tmp_path / "blip"))
    with pytest.raises(GazeError, match="602 tokens are more than the 512 that this model reads: 'dog dog"):
        ask(picture, "dog " * 600, ["yes"])


def greedy(next_chances, spellings, end):
    """The answer and its probability: one token after the other, the most likely of those that go on with a choice.
    next_chances: of each token, after the tokens given. spellings: the choice of each tuple of tokens."""
    written, probability = (), 1.0
    while True:
        going_on = {
            ids[len(written)] if len(ids) > len(written) else end for ids in spellings if ids[: len(written)] == written
        }
        chances = next_chances(written)
        token = max(going_on, key=lambda each: chances[each])
        if token == end or going_on == {end}:
            return spellings[written], probability
        written, probability = (*written, token), probability * float(chances[token])


def spelled(tokenizer, choices):
    return {
        tuple(tokenizer.encode(text, add_special_tokens=False)): choice
        for choice in choices
        for text in (choice, f" {choice}", choice.capitalize(), f" {choice.capitalize()}")
    }


CHOICES = (["yes", "no"], ["Yes"], ["red", "red dog", "dog"], ["red dog", "red cat", "red"], ["1", "2", "3", "4"])


@pytest.mark.parametrize("chats", [True, False])
def test_a_model_that_chats(tmp_path, picture, chats):
    folder = asked_models.llava(tmp_path, chats)
    around = None if chats else "<image> {question} answer:"
    ask = open_asker(folder, around=around)
    model, processor = (
        LlavaForConditionalGeneration.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder, backend="pil"),
    )
    said = set()
    for question in ("is there a dog?", "what color is the cat?"):
        for choices in CHOICES:
            full = question + (f" Answer with one of these: {', '.join(choices)}." if len(choices) > 1 else "")
            text = f"user: <image>{full} assistant: " if chats else f"<image> {full} answer:"
            inputs = processor(images=picture, text=text, return_tensors="pt")

            def next_chances(written, inputs=inputs):
                ids = torch.cat([inputs["input_ids"], torch.tensor([written], dtype=torch.long)], dim=1)
                with torch.no_grad():
                    return model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1].softmax(0)

            tokenizer = processor.tokenizer
            expected, probability = greedy(next_chances, spelled(tokenizer, choices), tokenizer.eos_token_id)
            assert ask(picture, question, choices) == Answer(expected, pytest.approx(probability, rel=1e-4))
            said.add(expected)
    assert len(said) > 3
    # What stands for a picture is no part of a prompt.
    assert ask(picture, "is it <image>red?", ["red", "blue"]) == ask(picture, "is it red?", ["red", "blue"])


def test_penalties_that_a_models_own_file_asks_for_do_not_tell(tmp_path, picture):
    """A word would be less likely, because the question has it."""
    model, processor = open_judge(str(asked_models.llava(tmp_path)), NEEDED, "AutoModelForImageTextToText")
    ask, questions = writer(model, processor, list_choices=False), ("is it red?", "is it blue?", "is it red or a dog?")
    plain = [ask(picture, question, ["red", "blue"]) for question in questions]
    model.generation_config.repetition_penalty = 50.0
    assert [ask(picture, question, ["red", "blue"]) for question in questions] == plain


def test_a_model_of_visual_question_answering_that_writes(tmp_path, picture):
    folder = asked_models.blip(tmp_path)
    ask, question = open_asker(folder), "what color is the cat?"
    model, processor = (
        BlipForQuestionAnswering.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder, backend="pil"),
    )
    inputs = processor(images=picture, text=question, return_tensors="pt")  # as it is, without the choices
    for choices in CHOICES:

        def next_chances(written):
            with torch.no_grad():
                seen = model.vision_model(inputs["pixel_values"]).last_hidden_state
                read = model.text_encoder(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    encoder_hidden_states=seen,
                ).last_hidden_state
                return (
                    model.text_decoder(input_ids=torch.tensor([[101, *written]]), encoder_hidden_states=read)
                    .logits[0, -1]
                    .softmax(0)
                )

        expected, probability = greedy(next_chances, spelled(processor.tokenizer, choices), 102)
        assert ask(picture, question, choices) == Answer(expected, pytest.approx(probability, rel=1e-4))


def test_what_does_not_fit_is_an_error(tmp_path):
    with pytest.raises(GazeError, match="has no place for the question"):
        open_asker(asked_models.llava(tmp_path / "llava"), around="Question:")
    ask = open_asker(tmp_path / "llava", around="Q: {question} A:")
    with pytest.raises(GazeError, match=r"does not read 'Q: is it red\? A:'"):
        ask(PICTURE, "is it red?", ["Yes"])
    with pytest.raises(GazeError, match="reads the question alone"):
        open_asker(asked_models.vilt(tmp_path / "vilt"), around="Q: {question} A:")
    with pytest.raises(GazeError, match="is a CLIPModel, and a model that answers questions about a picture"):
        open_asker(small_judges.clip(tmp_path / "clip"))
