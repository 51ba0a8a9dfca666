"""The commands of `gaze evaluate`. Each imports what it needs when it runs."""

from typing import Annotated, Any

import typer

from .evaluate_options import EvaluateOptions, JudgeOptions, started
from .options import with_picture_options

evaluate = typer.Typer(
    help="Score a model, or finished pictures. Each works over several processes with accelerate launch.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@evaluate.command(short_help="Emoji: is the true picture the nearest?")
@with_picture_options
def retrieval(
    *,
    data: Annotated[
        str, typer.Option(metavar="FOLDER", help="Has train/ and heldout/, pictures named.")
    ] = "data/emoji",
    split: Annotated[str, typer.Option(metavar="NAME", help="seen or heldout.")] = "heldout",
    language: Annotated[str, typer.Option(metavar="CODE", help="Of the names, as fr; the data must have it.")] = "en",
    n: Annotated[
        int | None, typer.Option("-n", min=1, metavar="N", help="Prompts. [default: 200 seen, every held-out one]")
    ] = None,
    options: EvaluateOptions,
) -> None:
    """How often is the true picture nearest to the prompt's the right one? Score with a 95 % interval."""
    with started(options) as (group, advance):
        from diffusion.prompts import escape

        from .evaluation import ask, sum_up
        from .judges.frame import judged
        from .judges.pictures import Asked

        settings = options.drawn_with()
        exam = ask(data, split, n, settings["seed"], language)
        asked = options.asked(lambda: [Asked(escape(prompt)) for prompt in exam.prompts])
        cases = judged(group, asked, settings, exam.judge, options.batch_size, advance)
    if cases is not None:
        report = sum_up(exam, [(case.asked.text, case.verdict) for case in cases], options.source(cases))
        options.show("gaze evaluate retrieval", report, cases, _retrieval_table)


def _retrieval_table(report: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in report["settings"].items())
    interval = f"95 % interval {report['low']:.1%} to {report['high']:.1%}"
    found = f"{report['score']:.1%} top-1 ({interval}), {report['right']} of {report['n']}"
    return f"{report['split']}: {found}\n{settings}"


@evaluate.command(short_help="Plain shapes: exact, skill by skill.")
@with_picture_options
def shapes(
    *,
    split: Annotated[str, typer.Option(metavar="NAME", help="seen or heldout combinations.")] = "heldout",
    n: Annotated[int, typer.Option("-n", metavar="N", help="Prompts, six skills in turn.")] = 300,
    sheet: Annotated[
        str | None, typer.Option(metavar="FILE", help="A PNG of the pictures that break most facts.")
    ] = None,
    options: EvaluateOptions,
) -> None:
    """How often does a picture of plain shapes show exactly what the caption says? Scores with 95 % intervals, for
    each of six skills and their mean."""
    from .files import check_writable, png_path

    path = None if sheet is None else png_path(sheet)
    if path is not None:
        check_writable(path.parent)
    with started(options) as (group, advance):
        from .judges.frame import judged
        from .judges.pictures import Asked
        from .shapes.captions import caption
        from .shapes.evaluation import exam, judge_of, summary
        from .skills import by_facts, save_worst, table

        scenes = exam(split, n)
        asked = options.asked(lambda: [Asked(caption(each)) for each in scenes])
        cases = judged(
            group, asked, options.drawn_with(), judge_of(scenes), options.batch_size, advance, order=by_facts
        )
    if cases is None:
        return
    report = {"split": split, **summary([(case.asked.text, case.verdict) for case in cases])}
    report["settings"] = options.source(cases)
    if path is not None:
        save_worst(report, [case.image for case in cases], path)
    options.show("gaze evaluate shapes", report, cases, table, by_facts)


@evaluate.command(short_help="Any prompts: CLIPScore, or SigLIP's probability.")
@with_picture_options
def clip(
    *,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help='Before each prompt. [default: "A photo depicts ", as published; SigLIP none]'
        ),
    ] = None,
    options: JudgeOptions,
) -> None:
    """How well do picture and prompt agree, says a CLIP (CLIPScore, 0 to 2.5) or a SigLIP (probability)? The mean, with
    a 95 % interval by bootstrap."""
    with started(options) as (group, advance):
        from .judges.clip import clip_judge
        from .judges.frame import judged
        from .judges.interval import enough, of_mean
        from .judges.report import report_of, table

        asked = options.chosen()
        enough(len(asked))
        judge, about = clip_judge(options.judge, prefix, options.judge_dtype)
        settings = options.drawn_with()
        cases = judged(group, asked, settings, judge, options.batch_size, advance)
    if cases is not None:
        summary = of_mean([case.verdict.score for case in cases], settings["seed"])
        report = report_of(cases, summary, {**options.source(cases), **about})
        options.show("gaze evaluate clip", report, cases, lambda report: table("clip", report))


REAL = Annotated[str, typer.Option(metavar="FOLDER", help="Real pictures to compare with.")]


@evaluate.command(short_help="Any pictures: Frechet distance to real ones.")
@with_picture_options
def fid(*, real: REAL, options: JudgeOptions) -> None:
    """How far are the pictures from real ones, as two normal clouds of a network's features? Lower is better; figures
    compare only with the same network, resizing and n. Needs more pictures than there are features."""
    _distance("fid", real, options)


@evaluate.command(short_help="Any pictures: kernel distance to real ones.")
@with_picture_options
def kid(*, real: REAL, options: JudgeOptions) -> None:
    """How far are the pictures from real ones, by a kernel on a network's features (unbiased, cubic)? Lower is better,
    0 is no difference; figures compare only with the same network and resizing."""
    _distance("kid", real, options)


def _distance(kind: str, real: str, options: JudgeOptions) -> None:
    with started(options) as (group, advance):
        from .judges import features
        from .judges.frame import judged
        from .judges.pictures import read_pictures
        from .judges.report import report_of, table

        asked = options.chosen(with_prompts=False)
        files = [str(each.file) for each in read_pictures(real, with_prompts=False)]
        look, about = features.feature_network(options.judge, options.judge_dtype)
        real_ND = features.collect_real(group, files, look, options.batch_size, advance)
        features.enough(kind, len(files), len(asked), real_ND.shape[1])
        settings, mine = options.drawn_with(), []
        judge = features.nearest_judge(look, real_ND, files, mine)
        cases = judged(group, asked, settings, judge, options.batch_size, advance)
        made = group.collect(
            group.count, [features.joined(mine)], features.pack_features, features.unpack_features, "made"
        )
    if cases is None or made is None:
        return
    summary = features.compare(kind, real_ND, features.joined(made), settings["seed"])
    about |= {"features": real_ND.shape[1], "real": real, "real_pictures": len(files)}
    report = report_of(cases, summary, {**options.source(cases), **about})
    options.show(f"gaze evaluate {kind}", report, cases, lambda report: table(kind, report))
