"""What the commands of `gaze evaluate` share: options, and what each does before and after its own work."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from diffusion.errors import GazeError

from .options import BatchSize, Debug, Json, PictureOptions, progress

if TYPE_CHECKING:
    from .judges.frame import Case
    from .judges.pictures import Asked
    from .processes import Processes


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(PictureOptions):
    """What is judged, and where the report goes."""

    pictures: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Finished pictures with prompts, instead of drawing any.")
    ] = None
    page: Annotated[
        str | None, typer.Option(metavar="FILE", help="An HTML page of the scores and the worst pictures.")
    ] = None
    batch_size: BatchSize = 8
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Picture i has seed + i. [default: 0]")] = None
    as_json: Json = False
    debug: Debug = False

    def asked(self, prompts: Callable[[], "Sequence[Asked]"], with_prompts: bool = True) -> "Sequence[Asked]":
        """The finished pictures, where there is a folder of them; else the prompts. GazeError: both cannot be had."""
        from .judges.pictures import read_pictures

        if self.pictures is None:
            return prompts()
        given = [name for name in self.settings() if name != "seed"]
        if given:
            raise GazeError(
                f"--pictures are finished, and {', '.join(given)} would say how to draw some", "one or the other"
            )
        return read_pictures(self.pictures, with_prompts)

    def drawn_with(self) -> dict[str, Any]:
        """The settings of the pictures to be drawn; those of one to be like have a prompt, which is not asked for."""
        settings = {"seed": 0, **self.settings()}
        return {name: value for name, value in settings.items() if name != "prompt"}

    def source(self, cases: "Sequence[Case]") -> dict[str, Any]:
        """What a report says of where the pictures are from: the settings that they have in common, or the folder."""
        from .judges.frame import in_common

        return in_common(cases) if self.pictures is None else {"pictures": self.pictures}

    def show(
        self,
        title: str,
        report: dict[str, Any],
        cases: "Sequence[Case]",
        table: Callable[[dict[str, Any]], str],
        order: "Callable[..., float] | None" = None,
    ) -> None:
        """Writes the page and prints the report. order: see `judged`."""
        if self.page is not None:
            from .judges.frame import by_score, worst_of
            from .judges.page import save_page

            save_page(title, report, worst_of(cases, order or by_score), Path(self.page))
        print(json.dumps(report) if self.as_json else table(report))


@dataclass(frozen=True, kw_only=True)
class JudgeOptions(EvaluateOptions):
    """Of the judges that are models, and ask what they are told to."""

    judge: Annotated[str, typer.Option(metavar="MODEL", help="Judges: a folder of transformers, or a hub id.")]
    judge_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of its weights: float32, bfloat16, or float16 on a GPU.")
    ] = "float32"
    prompts: Annotated[
        str | None, typer.Option(metavar="FILE", help='What to draw: one prompt a line, or JSONL with a key "prompt".')
    ] = None
    n: Annotated[int | None, typer.Option("-n", min=1, metavar="N", help="The first N alone. [default: all]")] = None

    def chosen(self, with_prompts: bool = True) -> "Sequence[Asked]":
        """The first n pictures of the folder, or prompts of the file. GazeError: there is neither, or fewer."""
        from .judges.pictures import read_prompts

        if (self.prompts is None) == (self.pictures is None):
            both = "both --prompts and --pictures were given"
            raise GazeError(
                "neither --prompts nor --pictures was given" if self.prompts is None else both,
                "--prompts FILE has them drawn, --pictures FOLDER has finished ones judged",
            )
        asked = self.asked(lambda: read_prompts(str(self.prompts)), with_prompts)
        if self.n is not None and self.n > len(asked):
            raise GazeError(f"-n {self.n} are more than the {len(asked)} there are", f"-n {len(asked)}, or without -n")
        return asked[: self.n]


@contextmanager
def started(options: EvaluateOptions) -> "Iterator[tuple[Processes, Callable[..., None]]]":
    """The processes of the command, and what moves the bar of progress. GazeError: the page cannot be written."""
    from .files import check_writable
    from .processes import processes

    with processes() as group:
        if options.page is not None and group.rank == 0:
            check_writable(Path(options.page).absolute().parent)
            if Path(options.page).is_dir():
                raise GazeError(f"{options.page!r} is a folder, so no page can be written there", "--page page.html")
        with progress(group.rank == 0) as advance:
            yield group, advance
