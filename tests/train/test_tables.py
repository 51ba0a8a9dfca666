"""Captioned pictures from parquet files and through the `datasets` library."""

import json
import sys

import pytest

from diffusion.errors import GazeError
from tests.pictures import picture, saved
from tests.train.tiny import tiny_recipe
from train.data.command import main
from train.data.dataset import Rows
from train.data.look import look
from train.data.open import open_source
from train.data.table import Table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FILES = [saved(picture(number), "PNG") for number in range(10)]
TEXTS = [f"picture {number}" for number in range(10)]


def table(path, start=0, end=10, rows=4, **columns):
    cells = {"image": [{"bytes": file, "path": None} for file in FILES[start:end]], "text": TEXTS[start:end], **columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table({name: cell for name, cell in cells.items() if cell is not None}), path, row_group_size=rows
    )
    return path


def test_the_recipe_opens_a_folder_of_tables(tmp_path):
    table(tmp_path / "data" / "b.parquet", 6, 10)
    table(tmp_path / "data" / "a" / "a.parquet", 0, 6)
    source = open_source(tiny_recipe(tmp_path / "run", None, data={"table": tmp_path / "data"}))
    assert [record.name for record in source][4:7] == ["a/a.parquet, row 4", "a/a.parquet, row 5", "b.parquet, row 0"]
    assert [record.captions for record in source] == [(text,) for text in TEXTS]
    assert source.blocks == [4, 2, 4]
    assert [source.read(index) for index in (9, 0, 5, 4)] == [FILES[index] for index in (9, 0, 5, 4)]
    assert {(record.height, record.width, record.repeats) for record in source} == {(16, 16, 1)}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary())])], ids=str)
def test_kinds_of_columns(tmp_path, kind):
    cells = [{"bytes": file} for file in FILES] if pa.types.is_struct(kind) else FILES
    captions = [["one", None, "two"]] * 9 + [["three"]]
    path = table(tmp_path / "a.parquet", image=None, text=None, picture=pa.array(cells, kind), captions=captions,
                 repeats=[3] * 9 + [0])  # fmt: skip
    recipe = tiny_recipe(
        tmp_path / "run", None, data={"table": path, "image_column": "picture", "text_column": "captions"}
    )
    source = open_source(recipe)
    assert [source.read(index) for index in range(10)] == FILES
    assert [(record.captions, record.repeats) for record in source] == [(("one", "two"), 3)] * 9 + [(("three",), 0)]


def test_rows_without_picture_or_caption_are_left_out(tmp_path):
    images = [*FILES[:7], None, b"<html>", FILES[9]]
    texts = [*TEXTS[:9], None]
    source, skipped = look(Table(table(tmp_path / "a.parquet", image=images, text=texts)))
    assert len(source) == 7
    assert [item.name for item in skipped] == [f"a.parquet, row {row}" for row in (7, 8, 9)]
    assert [item.reason.split(",")[0] for item in skipped] == [
        "there is no picture in the row",
        "the file cannot be read as a picture: it is none",
        "it has no caption",
    ]
    assert source.blocks == [4, 3]


@pytest.mark.parametrize(
    "columns, says",
    [
        ({"image": None, "img": FILES}, r"no column 'image' \(data\.image_column\).*\n.*did you mean 'img'"),
        ({"text": None, "txt": TEXTS}, r"no column 'text' \(data\.text_column\).*\n.*did you mean 'txt'"),
        ({"image": ["a.png"] * 10}, "'image' holds string, not the content"),
        ({"image": [{"path": "a.png"}] * 10}, "'image' holds struct<path: string>, not the content"),
        ({"text": list(range(10))}, "row 0: '0' is neither a caption"),
        ({"repeats": [-1] * 10}, "row 0: repeats is -1"),
        ({"repeats": [2**32] * 10}, "row 0: repeats is 4294967296"),
        ({"repeats": [1] * 9 + [None]}, "row 9: repeats is None"),
    ],
)
def test_a_wrong_column_is_named(tmp_path, columns, says):
    with pytest.raises(GazeError, match=says):
        Table(table(tmp_path / "a.parquet", **columns))


def test_a_table_that_is_none(tmp_path):
    with pytest.raises(GazeError, match="holds no parquet file"):
        Table(tmp_path)
    with pytest.raises(GazeError, match=r"none\.parquet cannot be read as parquet"):
        Table(tmp_path / "none.parquet")
    whole = table(tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-9])
    with pytest.raises(GazeError, match=r"a\.parquet cannot be read as parquet"):
        Table(tmp_path)
    with pytest.raises(GazeError, match="holds no row"):
        Table(table(tmp_path / "b.parquet", 0, 0, image=pa.array([], pa.binary())))


def test_a_broken_row_group_costs_its_pictures_alone(tmp_path):
    path = table(tmp_path / "a.parquet")
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[column.data_page_offset : column.data_page_offset + 30] = b"\xff" * 30
    path.write_bytes(content)
    source, skipped = look(Table(path))
    assert [record.name for record in source] == [f"a.parquet, row {row}" for row in (0, 1, 2, 3, 8, 9)]
    assert all("row group 1" in item.reason for item in skipped)


def test_tables_are_checked_and_packed(tmp_path, capsys):
    path = table(tmp_path / "a.parquet", image=None, img=FILES)
    assert main(["check", str(path), "--image-column", "img", "--workers", "0"]) == 0
    out = tmp_path / "out"
    assert main(["pack", str(path), str(out), "--image-column", "img", "--workers", "0"]) == 0
    assert main(["stats", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"] == 10


# datasets


@pytest.fixture(scope="module")
def saved_set(tmp_path_factory):
    """Two splits of a data set as save_to_disk writes it: the second is shuffled, and its pictures are files."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path_factory.mktemp("datasets")
    for number, content in enumerate(FILES):
        (folder / f"{number}.png").write_bytes(content)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    inside = datasets.Dataset.from_dict(
        {"image": [{"bytes": file, "path": None} for file in FILES], "text": TEXTS}, features
    )
    outside = datasets.Dataset.from_dict(
        {"image": [str(folder / f"{n}.png") for n in range(10)], "text": TEXTS}, features
    )
    both = datasets.DatasetDict({"train": inside, "test": outside.select(range(9, -1, -1))})
    both.save_to_disk(folder / "both")
    inside.save_to_disk(folder / "one")
    table(folder / "plain" / "train.parquet")
    return folder


@pytest.mark.parametrize("name, split", [("both", "train"), ("both", "test"), ("one", "train"), ("plain", "train")])
def test_the_recipe_opens_a_data_set(saved_set, tmp_path, monkeypatch, name, split):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tmp_path / "run", None, data={"dataset": str(saved_set / name), "split": split})
    source = open_source(recipe)
    order = list(range(10))[:: -1 if split == "test" else 1]
    assert [record.captions for record in source] == [(TEXTS[index],) for index in order]
    assert [source.read(index) for index in range(10)] == [FILES[index] for index in order]
    assert source[3].name == "row 3"
    assert source.blocks == [10]


def test_other_columns_of_a_data_set(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"file": FILES, "captions": [["a", "b"]] * 10}).with_format("torch")
    rows.save_to_disk(tmp_path / "set")
    data = {"dataset": str(tmp_path / "set"), "image_column": "file", "text_column": "captions"}
    source = open_source(tiny_recipe(tmp_path / "run", None, data=data))
    assert source[9].captions == ("a", "b")
    assert source.read(9) == FILES[9]


def test_a_data_set_that_is_none(saved_set, monkeypatch):
    import datasets

    with pytest.raises(GazeError, match=r"no split 'valid' \(data\.split\).*\n.*choices: test, train"):
        Rows(str(saved_set / "both"), "valid")
    with pytest.raises(GazeError, match=r"no column 'img' \(data\.image_column\).*\n.*did you mean 'image'"):
        Rows(str(saved_set / "one"), image_column="img")

    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(GazeError, match="'somebody/pictures' cannot be opened: ConnectionError: no network"):
        Rows("somebody/pictures")


def test_pictures_beside_a_data_set_are_read_where_they_lie(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = [json.dumps({"file_name": f"{number}.png", "text": TEXTS[number]}) for number in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    for number in range(3):
        (folder / f"{number}.png").write_bytes(FILES[number])
    place = Rows(str(folder))
    assert [place.read(index) for index in range(3)] == FILES[:3]
    (folder / "1.png").unlink()
    assert look(place)[1][0].reason == f"{folder / '1.png'} cannot be read: No such file or directory"


@pytest.mark.parametrize("module, kind, extra", [("pyarrow", "table", "parquet"), ("datasets", "dataset", "datasets")])
def test_without_the_extra(tmp_path, monkeypatch, module, kind, extra):
    path = table(tmp_path / "a.parquet")
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(GazeError, match=rf"needs {module}.*\n.*pip install -e '\.\[{extra}\]'"):
        open_source(tiny_recipe(tmp_path / "run", None, data={kind: str(path)}))
