"""Captioned pictures from parquet files, as `datasets` and img2dataset write them: a row each, with the file in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffusion.errors import GazeError, nearest

from .source import MOST_REPEATS, Entry, Listed, need

GROUPS = 4  # row groups of pictures that a process keeps in memory
REPEATS = "repeats"


class Table(Listed):
    """A parquet file, or a folder of them, as a Place; each row group is a block.

    image_column: the file's content, or a struct with it under `bytes`. text_column: a caption or a list of them. A
    column `repeats` of whole numbers counts as in a folder's metadata.jsonl.
    Raises GazeError for a file that cannot be read, and for a missing column with the nearest one.
    """

    def __init__(self, path: str | Path, image_column: str = "image", text_column: str = "text"):
        root = Path(path)
        files = sorted(root.rglob("*.parquet")) if root.is_dir() else [root]
        if not files:
            raise GazeError(f"{root} holds no parquet file", "check data.table")
        self.column = image_column
        self.entries = []
        self.groups: list[tuple[str, int]] = []  # file and number of each row group
        self.sizes: list[int] = []  # their rows
        for file in files:
            self._add(file, file.name if file == root else file.relative_to(root).as_posix(), text_column)
        self.ends = list(accumulate(self.sizes))
        if not self.entries:
            raise GazeError(f"{root} holds no row", "check data.table")

    def _add(self, file: Path, name: str, text_column: str) -> None:
        pq = need("pyarrow.parquet", "parquet", f"the table {file}")
        types = need("pyarrow.types", "parquet", f"the table {file}")
        try:
            opened = pq.ParquetFile(file)
            schema = {field.name: field.type for field in opened.schema_arrow}
            require_columns(str(file), schema, image_column=self.column, text_column=text_column)
            kind = schema[self.column]
            content = kind.field("bytes").type if types.is_struct(kind) and "bytes" in kind.names else kind
            if not (types.is_binary(content) or types.is_large_binary(content)):
                raise GazeError(
                    f"{file}: column {self.column!r} holds {kind}, not the content of pictures' files",
                    nearest(self.column, schema) + " (data.image_column)",
                )
            repeated = REPEATS in schema and types.is_integer(schema[REPEATS])
            rows = opened.read(columns=[text_column, *([REPEATS] if repeated else [])])
            sizes = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
        except (OSError, ValueError) as error:  # pyarrow's own are kinds of these
            raise GazeError(
                f"{file} cannot be read as parquet: {error}", "check data.table, or copy it again"
            ) from None
        texts = rows[text_column].to_pylist()
        repeats = rows[REPEATS].to_pylist() if repeated else [1] * len(texts)
        for row, (text, times) in enumerate(zip(texts, repeats, strict=True)):
            where = f"{name}, row {row}"
            if times is None or not 0 <= times <= MOST_REPEATS:
                raise GazeError(f"{where}: repeats is {times!r}", f"0 to {MOST_REPEATS}; 0 leaves the picture out")
            self.entries.append(Entry(where, captions_of(text, where), times))
        self.groups += [(str(file), group) for group in range(len(sizes))]
        self.sizes += sizes

    @property
    def blocks(self) -> list[int]:
        return self.sizes

    def read(self, index: int) -> bytes:
        """The picture's file. Raises GazeError when it cannot be read. Reads the whole row group at first."""
        block = bisect_right(self.ends, index)
        row = index - self.ends[block] + self.sizes[block]
        return content_of(_pictures(*self.groups[block], self.column)[row].as_py())


@lru_cache(GROUPS)
def _pictures(file: str, group: int, column: str) -> Any:
    pq = need("pyarrow.parquet", "parquet", f"the table {file}")
    try:
        return pq.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)[column]
    except (OSError, ValueError) as error:
        raise GazeError(f"row group {group} of {file} cannot be read: {error}", "copy the file again") from None


def require_columns(where: str, columns: Mapping[str, Any], **wanted: str) -> None:
    """wanted: a key of the recipe's data section -> the column that it names. Raises GazeError with the nearest."""
    for key, name in wanted.items():
        if name not in columns:
            raise GazeError(f"{where} has no column {name!r} (data.{key})", nearest(name, columns))


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """A cell of the text column: a caption, a list of them, or nothing."""
    captions = [caption for caption in (value if isinstance(value, list) else [value]) if caption is not None]
    if not all(isinstance(caption, str) for caption in captions):
        raise GazeError(f"{where}: {str(value)[:50]!r} is neither a caption nor a list of captions", "data.text_column")
    return tuple(captions)


def content_of(value: Any) -> bytes:
    """A cell of the image column. Raises GazeError when it holds no file."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise GazeError("there is no picture in the row, or only its path")
    return content
