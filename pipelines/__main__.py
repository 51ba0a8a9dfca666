"""The `gaze` command. Results go to stdout, progress and errors to stderr.

Each command imports what it needs when it runs: torch takes seconds to import, and a help page should not.
"""

import json
import os
import sys
import warnings
from typing import Annotated

import typer

from diffusion.errors import GazeError
from pipelines import __version__

from .attend import attend
from .commands import generate, grid, info
from .edit_command import edit
from .evaluate_commands import evaluate
from .options import (
    Debug,
    Json,
    ModelFolder,
    PredictionType,
    Size,
    TokenizerFolder,
    size_of,
)

app = typer.Typer(
    name="gaze",
    help="Pictures from words: make them, score a model, measure its speed, convert and inspect models.",
    epilog="To train a model: accelerate launch -m train CONFIG",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(evaluate, name="evaluate")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gaze {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(generate)
app.command(short_help="Vary settings along axes.")(grid)
app.command(short_help="Show which pixels look at which word.")(attend)
app.command(short_help="Draw a picture again with other words.")(edit)
app.command(short_help="Print the settings inside a PNG.")(info)


@app.command(short_help="List every scheduler.")
def schedulers(as_json: Json = False, debug: Debug = False) -> None:
    """List every scheduler: order, network calls for n steps, whether it adds noise, the models it fits. Those with a
    class are diffusers', which go by the class's name too; NAME:KEY=VALUE,KEY=VALUE sets options of the class."""
    from diffusion.schedulers import table

    rows = table()
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{'name':<32}{'order':<7}{'calls':<8}{'noise':<7}{'prediction types':<55}diffusers class")
    for row in rows:
        needs = f" (needs {row['needs']})" if row["needs"] else ""
        print(
            f"{row['name']:<32}{row['order']:<7}{row['calls']:<8}{'yes' if row['stochastic'] else 'no':<7}"
            f"{', '.join(row['prediction_types']):<55}{row['class']}{needs}"
        )


@app.command(short_help="Measure speed against diffusers.")
def benchmark(
    model: ModelFolder = None,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = "a red apple",
    scheduler: Annotated[str, typer.Option(metavar="NAME", help="ddim, euler or dpmpp_2m.")] = "ddim",
    steps: Annotated[
        int, typer.Option("--steps", "--num-inference-steps", min=1, metavar="N", help="Steps of the scheduler.")
    ] = 20,
    cfg: Annotated[float, typer.Option("--cfg", "--guidance-scale", metavar="X", help="1 turns guidance off.")] = 7.5,
    size: Size = None,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the start noise.")] = 0,
    pairs: Annotated[int, typer.Option(min=1, metavar="N", help="Warm runs of each, interleaved.")] = 15,
    cold_pairs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Runs of each in a fresh process, import included.")
    ] = 3,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time one picture here against diffusers' pipeline: same weights, noise, steps, guidance, dtype, interleaved."""
    from pipelines.benchmark import compare, table

    width, height = size_of(size)
    report = compare(
        model,
        prompt=prompt,
        scheduler=scheduler,
        num_inference_steps=steps,
        guidance_scale=cfg,
        height=height,
        width=width,
        seed=seed,
        pairs=pairs,
        cold_pairs=cold_pairs,
    )
    print(json.dumps(report) if as_json else table(report))


@app.command(short_help="Model folder <-> single file.")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Model folder, hub id or .safetensors file.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="A .safetensors file, or a folder.")],
    tokenizer: TokenizerFolder = None,
    prediction_type: PredictionType = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="float32, float16 or bfloat16. [default: as in IN]")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model between a diffusers folder and one file in the original key layout of Stable Diffusion 1.x, 2.x
    or XL. Safetensors only; OUT is written whole or not at all."""
    from diffusion.convert import convert as convert_model
    from diffusion.placement import dtype_of

    from .shipped import place_of

    wanted = None if dtype is None else dtype_of(dtype)
    structure = convert_model(place_of(source), target, tokenizer, prediction_type, wanted)
    report = {"path": target, "structure": structure.family.name, **structure.schedule}
    print(json.dumps(report) if as_json else f"{target}  {structure.family.name}, {report['prediction_type']}")


@app.command(short_help="What a model is and what it costs.")
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder, .safetensors file, hub id, emoji, shapes. [default: emoji]"),
    ] = None,
    size: Size = None,
    prediction_type: PredictionType = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a model's structure, parameters, prediction type, FLOPs of a U-Net forward and memory at a size."""
    from pipelines.inspection import inspect as inspect_model
    from pipelines.inspection import table

    width, height = size_of(size)
    report = inspect_model(model, height, width, prediction_type)
    print(json.dumps(report) if as_json else table(report))


def main() -> None:
    """Runs the command line. An error is a few lines on stderr and exit code 1; wrong usage is 2, Ctrl-C 130."""
    os.environ["GAZE_DEBUG"] = os.environ.get("GAZE_DEBUG", "")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also those of loading weights
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        app(prog_name="gaze")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ["GAZE_DEBUG"] not in ("", "0"):
            raise
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            error = GazeError("there is not enough memory for this", "a smaller --size, --tile 512 or --dtype bfloat16")
        known = isinstance(error, GazeError)
        hint = "" if known else "\n  try: the same with --debug, which shows where this happened"
        where = f" in process {os.environ['RANK']}" if "RANK" in os.environ else ""
        print(f"error{where}: {error if known else f'{type(error).__name__}: {error}'}{hint}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
