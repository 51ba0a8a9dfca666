"""What a recipe's data section, or a path on the command line, names: opened, and looked at where nobody has before."""

from __future__ import annotations

import warnings
from pathlib import Path

from diffusion.errors import GazeError

from ..config import Data, Recipe
from ..processes import Processes
from .dataset import SAVED, Rows
from .decode import colour
from .folder import Folder
from .look import look, refuse_many
from .remote import is_url
from .shards import MANIFEST, Shards
from .source import Place, Source
from .table import Table

SKIPPED = "skipped.txt"


def open_source(recipe: Recipe, processes: Processes | None = None) -> Source:
    """The pictures that recipe.data names and that decode and have a caption; the others are listed in out/skipped.txt.

    All processes must call it together. Raises GazeError for what cannot be opened, where more than 5 % are left out,
    and for a background that is no colour.
    """
    processes = processes or Processes()
    colour(recipe.data.background)
    place = open_place(recipe.data, recipe.out)
    if isinstance(place, Shards):
        if not len(place):
            raise GazeError(f"{place.root} holds no picture", "check data.shards")
        return place
    source, skipped = look(place, recipe.data.workers, processes)
    if skipped and processes.first:
        listed = recipe.out / SKIPPED
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{item.name}: {item.reason}\n" for item in skipped), encoding="utf-8")
        warnings.warn(
            f"{len(skipped)} of {len(place)} pictures are left out, first {skipped[0].name}: {skipped[0].reason}; "
            f"all are listed in {listed}",
            stacklevel=2,
        )
    refuse_many(skipped, len(place))
    return source


def open_place(data: Data, out: Path) -> Place:
    """Where recipe.data says, before anybody has looked at the pictures. out: of the run."""
    if data.shards is not None:
        return Shards(data.shards, (data.cache or out / "cache") / "shards")
    if data.table is not None:
        return Table(data.table, data.image_column, data.text_column)
    if data.dataset is not None:
        return Rows(data.dataset, data.split, data.image_column, data.text_column)
    return Folder(data.folder or out / "drawn")


def data_at(path: str) -> dict[str, str]:
    """The key of a recipe's data section that fits what lies at a path or URL, with the path as its value."""
    place = Path(path)
    if is_url(path) or (place / MANIFEST).is_file():
        return {"shards": path}
    if any((place / name).is_file() for name in SAVED):
        return {"dataset": path}
    if place.suffix == ".parquet" or (place.is_dir() and any(place.rglob("*.parquet"))):
        return {"table": path}
    return {"folder": path}
