"""The commands of `gaze evaluate` that ask a model what a picture shows: detect and vqa."""

from typing import Annotated, Any

import typer

from diffusion.errors import GazeError, nearest

from .evaluate_options import JudgeOptions, started
from .options import with_picture_options

SCORES = ("vqascore", "tifa")
FactsFile = Annotated[
    str | None,
    typer.Option(
        "--facts", metavar="FILE", help="JSONL with prompts and facts, as GenEval's. [default: the prompts' own]"
    ),
]


@with_picture_options
def detect(
    *,
    colours: Annotated[
        str, typer.Option(metavar="MODEL", help="Names colours: a CLIP or SigLIP, a folder or a hub id.")
    ] = "openai/clip-vit-large-patch14",
    facts: FactsFile = None,
    threshold: Annotated[float, typer.Option(min=0, max=1, metavar="X", help="Boxes of a higher score count.")] = 0.3,
    counting_threshold: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="X", help="For the skill counting. [default: --threshold]")
    ] = None,
    max_overlap: Annotated[
        float, typer.Option(min=0, max=1, metavar="X", help="Of two objects of a name; 1 takes every box.")
    ] = 0.7,
    margin: Annotated[
        float, typer.Option(min=0, metavar="X", help="Of the objects' sides, before one lies beside another.")
    ] = 0.1,
    only_asked: Annotated[
        bool, typer.Option("--only-asked", help="Look for what the prompt names, not for all that any prompt names.")
    ] = False,
    options: JudgeOptions,
) -> None:
    """How often does a detector find all that the prompt says, and no more? GenEval's protocol and six skills. Prompts:
    a file with facts, such as GenEval's evaluation_metadata.jsonl, or 300 of our own."""
    with started(options) as (group, advance):
        from .judges.colours import open_colours
        from .judges.detect import Rules, detect_judge, summary
        from .judges.detectors import open_detector
        from .judges.everyday import exam
        from .judges.facts import COLOURS, colours_of, facts_for
        from .judges.frame import judged
        from .judges.report import report_of, table
        from .skills import by_facts

        asked = options.chosen(otherwise=lambda: exam(options.n or 300))
        known = facts_for(asked, facts)
        rules = Rules(threshold, threshold if counting_threshold is None else counting_threshold, max_overlap)
        rules = rules._replace(margin=margin)
        find = open_detector(options.judge, min(rules.threshold, rules.counting_threshold), options.judge_dtype)
        named = [colour for each in known.values() for colour in colours_of(each)]
        choices = [*dict.fromkeys([*COLOURS, *named])]
        name_colours = open_colours(colours, choices, options.judge_dtype) if named else None
        judge = detect_judge(find, name_colours, known, rules, only_asked)
        cases = judged(group, asked, options.drawn_with(), judge, options.batch_size, advance, by_facts)
    if cases is not None:
        about = {
            "judge": options.judge,
            "judge_dtype": options.judge_dtype,
            **rules._asdict(),
            "only_asked": only_asked,
        }
        about |= {"colours": colours} if named else {}
        report = report_of(cases, summary([case.verdict for case in cases]), {**options.source(cases), **about})
        options.show("gaze evaluate detect", report, cases, lambda report: table("mean", report, ".1%"), by_facts)


@with_picture_options
def vqa(
    *,
    score: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="vqascore or tifa. [default: tifa with --questions, else vqascore]"),
    ] = None,
    questions: Annotated[
        str | None, typer.Option(metavar="FILE", help="For tifa, with answers. [default: made from the prompts' facts]")
    ] = None,
    question: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='For vqascore. [default: Does this figure show "{prompt}"? Please ...]'),
    ] = None,
    around: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help='What a model without a chat template reads, such as "Q: {question} A:".'),
    ] = None,
    options: JudgeOptions,
) -> None:
    """Does a model that answers questions see what the prompt says? vqascore: the probability of "Yes" when asked
    whether the picture shows the prompt. tifa: the share of right answers to questions about it, by kind."""
    kind = score or ("vqascore" if questions is None else "tifa")
    if kind not in SCORES:
        raise GazeError(f"unknown score {kind!r:.100}", nearest(kind, SCORES))
    unread = {"tifa": ("question", question), "vqascore": ("questions", questions)}[kind]
    if unread[1] is not None:
        raise GazeError(f"--{unread[0]} says nothing to the score {kind}", "without it, or the other --score")
    with started(options) as (group, advance):
        from diffusion.prompts import escape

        from .judges.answers import open_asker
        from .judges.everyday import exam
        from .judges.frame import judged
        from .judges.interval import enough, of_mean
        from .judges.pictures import Asked
        from .judges.questions import questions_for, read_questions
        from .judges.report import report_of, table
        from .judges.verdict import Judge
        from .judges.vqa import DOES_IT_SHOW, tifa_judge, tifa_summary, vqascore_judge

        def own() -> list[Asked]:
            return [Asked(escape(each)) for each in read_questions(questions)] if questions else exam(options.n or 300)

        asked = options.chosen(otherwise=own)
        enough(len(asked))
        known = questions_for(asked, questions) if kind == "tifa" else {}
        ask = open_asker(options.judge, around, options.judge_dtype)
        judge: Judge = tifa_judge(ask, known) if known else vqascore_judge(ask, question or DOES_IT_SHOW)
        settings = options.drawn_with()
        cases = judged(group, asked, settings, judge, options.batch_size, advance)
    if cases is None:
        return
    verdicts = [case.verdict for case in cases]
    about: dict[str, Any] = {"judge": options.judge, "judge_dtype": options.judge_dtype}
    about |= {} if around is None else {"around": around}
    if known:
        summary, about["questions"] = tifa_summary(verdicts, settings["seed"]), questions or "made from facts"
    else:
        summary = of_mean([verdict.score for verdict in verdicts], settings["seed"])
        about["question"] = question or DOES_IT_SHOW
    report = report_of(cases, summary, {**options.source(cases), **about})
    options.show("gaze evaluate vqa", report, cases, lambda report: table(kind, report))
