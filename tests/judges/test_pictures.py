"""Files of prompts and folders of finished pictures."""

import json

import pytest
from PIL import Image

from diffusion.errors import GazeError
from pipelines.judges.pictures import Asked, read_pictures, read_prompts
from pipelines.png import save_png


def picture(path, colour="red"):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def test_prompts_of_a_text_file(tmp_path):
    (tmp_path / "p.txt").write_text("a (red:1.5) heart\n\n a \\(small\\) dog \n")
    asked = read_prompts(str(tmp_path / "p.txt"))
    assert [each.prompt for each in asked] == ["a (red:1.5) heart", "a \\(small\\) dog"]
    assert [each.text for each in asked] == ["a red heart", "a (small) dog"]
    assert {each.file for each in asked} == {None}


def test_prompts_of_a_jsonl_file_keep_their_keys(tmp_path):
    """As GenEval's evaluation_metadata.jsonl."""
    row = {"tag": "two_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog\u2028and a cat"}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n\n" + '{"prompt": ["a", "b"]}\n')
    first, second = read_prompts(str(tmp_path / "p.jsonl"))
    assert first == Asked(row["prompt"], row)
    assert second.prompt == "a"


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", "", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', r"line 2: prompt is None, which is no prompt"),
        ("p.jsonl", '{"prompt": "a"}\nnot json', "line 2"),
        ("p.jsonl", "[]", r"line 1: \[\] is no JSON object"),
        ("p.jsonl", "[" * 100_000, "line 1"),
        ("p.jsonl", b"\xff", "line 1"),
        ("none.jsonl", None, "cannot be read"),
        ("none.txt", None, "cannot be read"),
    ],
)
def test_files_without_prompts_are_named(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GazeError, match=says):
        read_prompts(str(tmp_path / name))


def test_a_folder_with_metadata(tmp_path):
    for name in ("b.png", "a.png"):
        picture(tmp_path / name)
    rows = [
        {"file_name": "b.png", "text": ["a (red) thing", "red"], "name": "thing"},
        {"file_name": "a.png", "text": "x", "prompt": "y"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, second = read_pictures(str(tmp_path))
    assert (first.text, first.file, first.more["name"]) == ("a (red) thing", str(tmp_path / "b.png"), "thing")
    assert second.text == "y"


def test_a_folder_with_a_text_beside_each_picture(tmp_path):
    picture(tmp_path / "2.png")
    picture(tmp_path / "1.jpg")
    (tmp_path / "2.txt").write_text("a (small) dog\n")
    (tmp_path / "1.txt").write_text("a cat")
    assert [each.text for each in read_pictures(str(tmp_path))] == ["a cat", "a (small) dog"]


def test_pictures_that_hold_their_prompts(tmp_path):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "1.png", {"prompt": "a (red:1.4) dog", "seed": 3})
    of_a1111 = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 3, Size: 8x8"
    save_png(Image.new("RGB", (8, 8)), tmp_path / "2.png", parameters=of_a1111)
    assert [each.text for each in read_pictures(str(tmp_path))] == ["a red dog", "a cat"]


def test_prompts_may_be_done_without(tmp_path):
    picture(tmp_path / "1.png")
    assert [each.prompt for each in read_pictures(str(tmp_path), with_prompts=False)] == [""]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}')
    assert [each.prompt for each in read_pictures(str(tmp_path), with_prompts=False)] == [""]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": ""}')
    assert [each.prompt for each in read_pictures(str(tmp_path), with_prompts=False)] == [""]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png"}')
    with pytest.raises(GazeError, match=r"metadata\.jsonl, line 1: text is None"):
        read_pictures(str(tmp_path))


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"file_name": "none.png", "text": "a"}', "there is no picture file_name 'none.png'"),
        ('{"file_name": "../other/1.png", "text": "a"}', "lies outside the folder"),
        ('{"file_name": 7, "text": "a"}', "there is no picture file_name 7"),
        ('{"file_name": "\\u0000", "text": "a"}', "there is no picture"),
        ('{"text": "a"}', "there is no picture file_name None"),
        ('{"file_name": "1.png", "text": 7}', "text is 7"),
        ('{"file_name": "1.png", "text": []}', r"text is \[\]"),
        ('{"file_name": "1.png", "text": " "}', "text is ' '"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, says):
    picture(tmp_path / "made" / "1.png")
    picture(tmp_path / "other" / "1.png")
    (tmp_path / "made" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}\n' + line)
    with pytest.raises(GazeError, match=says) as error:
        read_pictures(str(tmp_path / "made"))
    assert "metadata.jsonl, line 2" in error.value.problem


def test_folders_without_pictures_or_prompts_are_named(tmp_path):
    with pytest.raises(GazeError, match="does not exist"):
        read_pictures(str(tmp_path / "none"))
    (tmp_path / "file").touch()
    with pytest.raises(GazeError, match="is no folder"):
        read_pictures(str(tmp_path / "file"))
    with pytest.raises(GazeError, match="holds no picture"):
        read_pictures(str(tmp_path))
    for name in ("1.png", "1.jpg"):
        picture(tmp_path / name)
        with pytest.raises(GazeError, match=f"{name} has no prompt") as error:
            read_pictures(str(tmp_path))
        assert "metadata.jsonl" in error.value.hint
        (tmp_path / name).unlink()
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("\n")
    with pytest.raises(GazeError, match=r"1\.png has no prompt"):
        read_pictures(str(tmp_path))
    (tmp_path / "1.txt").write_bytes(b"\xff")
    with pytest.raises(GazeError, match=r"1\.txt cannot be read"):
        read_pictures(str(tmp_path))
