"""Captioned pictures through the `datasets` library: a folder of its save_to_disk, or a name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusion.errors import GazeError, nearest

from .source import Entry, Listed, need
from .table import captions_of, content_of, require_columns

SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes


class Rows(Listed):
    """One split of a data set as a Place.

    Raises GazeError when it cannot be opened, and for a missing split or column with the nearest one.
    """

    def __init__(self, name: str, split: str = "train", image_column: str = "image", text_column: str = "text"):
        datasets = need("datasets", "datasets", f"the data set {name}")
        try:
            if any((Path(name) / saved).is_file() for saved in SAVED):
                found: Any = datasets.load_from_disk(name)
            else:
                found = datasets.load_dataset(name)
        except Exception as error:  # of many kinds: network, file formats, unknown names
            raise GazeError(
                f"the data set {name!r} cannot be opened: {type(error).__name__}: {error}",
                "a folder that save_to_disk wrote, or the name of a public data set",
            ) from None
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise GazeError(f"{name} has no split {split!r} (data.split)", nearest(split, found))
            found = found[split]
        found = found.with_format(None)
        require_columns(name, found.features, image_column=image_column, text_column=text_column)
        self.entries = [
            Entry(f"row {row}", captions_of(text, f"{name}, row {row}"))
            for row, text in enumerate(found.select_columns([text_column])[:][text_column])
        ]
        if not self.entries:
            raise GazeError(f"{name} holds no row", "another data.split")
        self.rows, self.column = found.select_columns([image_column]), image_column
        if isinstance(found.features[image_column], datasets.Image):
            self.rows = self.rows.cast_column(image_column, datasets.Image(decode=False))

    def read(self, index: int) -> bytes:
        """The picture's file, from the data set or where its path leads. Raises GazeError when it cannot be read."""
        cell = self.rows[index][self.column]
        path = cell.get("path") if isinstance(cell, dict) and cell.get("bytes") is None else None
        try:
            return content_of(cell) if path is None else Path(path).read_bytes()
        except OSError as error:
            raise GazeError(f"{path} cannot be read: {error.strerror}") from None
