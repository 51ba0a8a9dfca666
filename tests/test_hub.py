"""Models by their id on the hub: from a cache laid out as huggingface_hub does it, and from a pretended hub."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.file_download import repo_folder_name

from diffusion.errors import GazeError
from diffusion.hub import TRANSFORMERS, local_path, wanted
from diffusion.pretrained import load_model
from pipelines.inspection import inspect

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "f" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing outside it may be reached."""

    def unreachable(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    return tmp_path / "hub"


def put(cache, folder, repo="owner/name", commit=COMMIT, refs=("main",)):
    """Blobs by their sum, snapshots that point to them, and references to the snapshots."""
    place = cache / repo_folder_name(repo_id=repo, repo_type="model")
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = place / "blobs" / f"{commit[:8]}{number}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link = place / "snapshots" / commit / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    for ref in refs:
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / ref).write_text(commit)
    return place / "snapshots" / commit


def refusal(action, *arguments):
    with pytest.raises(GazeError) as error:
        action(*arguments)
    assert len(str(error.value).splitlines()) <= 3
    return str(error.value)


def test_a_cached_model_opens_without_network(cache, folder):
    snapshot = put(cache, folder)
    other = put(cache, folder, commit=OTHER, refs=("v1.5",))
    assert local_path("owner/name") == local_path("owner/name@main") == local_path(f"owner/name@{COMMIT}") == snapshot
    assert local_path("owner/name@v1.5") == other
    assert load_model("owner/name").unet.config == load_model(folder).unet.config
    assert inspect("owner/name")["parameters"] == inspect(folder)["parameters"]


def test_paths_that_exist_win(cache, folder, tmp_path):
    put(cache, folder)
    shutil.copytree(folder, tmp_path / "owner" / "name")
    assert local_path("owner/name") == Path("owner/name")
    for path in ("nowhere", "a/b/c", "/owner/name", "./owner/none", "../owner/none", "owner/..", "owner/a.safetensors"):
        assert local_path(path) == Path(path)
    for path in ("owner/a.ckpt", "owner/na me", "owner/name@", "owner/name@../x", "owner/näme", "owner/name\n"):
        assert local_path(path) == Path(path)
        assert "does not exist" in refusal(load_model, path)


def test_a_process_without_network_uses_the_cache_and_says_what_is_not_there(cache, folder, tmp_path):
    put(tmp_path / "home" / "hub", folder)
    code = """
import sys
from diffusion.errors import GazeError
from diffusion.hub import local_path
print(local_path("owner/name"))
for name in ("owner/none", "owner/name@v2"):
    try:
        local_path(name)
    except GazeError as error:
        print(error)
"""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    found, *said = done.stdout.splitlines()
    assert found.endswith(f"snapshots/{COMMIT}")
    assert "there is no file or folder 'owner/none'" in said[0]
    assert "it is not in " + str(tmp_path / "home" / "hub") in said[0]
    assert "OfflineModeIsEnabled" in said[0]
    assert "the path of a model, or a network" in said[1]
    assert "'owner/name@v2'" in said[2]


class Hub:
    """A hub of one model. names: of its files; error: what it answers instead."""

    def __init__(self, monkeypatch, cache, folder, error=None, extra=()):
        self.cache, self.folder, self.error, self.patterns = cache, folder, error, None
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        self.siblings = [SimpleNamespace(rfilename=name) for name in [*files, *extra]]
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", self.model_info)
        snapshot = huggingface_hub.snapshot_download

        def download(repo, revision=None, local_files_only=False, allow_patterns=None):
            if local_files_only:
                return snapshot(repo, revision=revision, local_files_only=True, allow_patterns=allow_patterns)
            self.patterns = allow_patterns
            return str(put(cache, folder, repo, refs=(revision or "main",)))

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    def model_info(self, repo, revision=None):
        if self.error is not None:
            raise self.error
        return SimpleNamespace(siblings=self.siblings, sha=COMMIT)


def test_a_model_is_fetched_once_and_only_what_is_read(cache, folder, monkeypatch):
    pickles = ["unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "model.ckpt", "run.py"]
    others = ["v1-5.safetensors", "README.md", "safety_checker/model.safetensors", "unet/x.onnx", "unet/model.py"]
    variants = ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"]
    hub = Hub(monkeypatch, cache, folder, extra=[*pickles, *others, *variants, "unet/*", "unet/[a].json"])
    assert local_path("owner/name@v2") == cache / "models--owner--name" / "snapshots" / COMMIT
    assert set(hub.patterns) == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    hub.error = AssertionError("asked again")
    assert load_model("owner/name@v2").unet.config == load_model(folder).unet.config


def test_what_a_cut_off_download_left_is_not_taken_for_a_model(cache, folder, monkeypatch):
    hub = Hub(monkeypatch, cache, folder, ConnectionError("no route"))
    for missing in ("unet/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"):
        snapshot = put(cache, folder)
        (snapshot / missing).unlink()
        assert "cannot be fetched (ConnectionError: no route)" in refusal(local_path, "owner/name")
        shutil.rmtree(cache)
    hub.error = None
    assert local_path("owner/name").is_dir()


def test_variants_are_fetched_where_there_is_nothing_better():
    stem = "unet/diffusion_pytorch_model"
    whole, half = f"{stem}.safetensors", f"{stem}.fp16.safetensors"
    shards = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half_shards = [f"{stem}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    new_shards = [f"{stem}-0000{i}-of-00002.fp16.safetensors" for i in (1, 2)]
    index, half_index = f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"
    assert wanted([half, whole]) == [whole]
    assert wanted([half]) == [half]
    assert wanted([half_shards[0], *shards, index]) == [index, *shards]
    assert wanted([half_index, *half_shards]) == [half_index, *half_shards]
    assert wanted(new_shards) == new_shards
    assert wanted(["text_encoder_2/model.fp16.safetensors", whole]) == [whole, "text_encoder_2/model.fp16.safetensors"]
    assert wanted(["../unet/config.json", "unet/../x.json", "/model_index.json", "unet/a/b.json", f"{stem}.bin"]) == []


def test_of_a_model_of_transformers_only_what_is_read_is_fetched(cache, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    read = ["config.json", "model.safetensors", "tokenizer.json", "merges.txt", "spiece.model", "chat_template.jinja"]
    for name in [*read, "pytorch_model.bin", "modeling.py", "flax_model.msgpack", "adapter_model.safetensors"]:
        (other / name).write_bytes(b"")
    hub = Hub(monkeypatch, cache, other, extra=["onnx/config.json", "../config.json", "tf_model.h5"])
    snapshot = local_path("owner/name", TRANSFORMERS)
    assert sorted(hub.patterns) == sorted(read)
    hub.error = AssertionError("asked again")
    assert local_path("owner/name", TRANSFORMERS) == snapshot
    (snapshot / "model.safetensors").unlink()
    hub.error = errors.OfflineModeIsEnabled("offline")
    assert "hf download owner/name --revision v2 --local-dir FOLDER, then copy" in refusal(
        local_path, "owner/name@v2", TRANSFORMERS
    )
    assert "cannot be fetched" in refusal(local_path, "owner/name", TRANSFORMERS), "it is not whole"


def test_a_folder_of_diffusers_is_no_model_of_transformers(cache, folder, monkeypatch):
    Hub(monkeypatch, cache, folder)
    assert "owner/name has no config.json, so it is no model of transformers" in refusal(
        local_path, "owner/name", TRANSFORMERS
    )


def answer(kind):
    response = SimpleNamespace(headers={}, status_code=404, request=None, url="", text="")
    return kind("an answer\nof several lines", response=response)


@pytest.mark.parametrize(
    "error, says, hint",
    [
        (answer(errors.GatedRepoError), "owner/name@v2 is for those who agreed to its terms", "hf auth login"),
        (answer(errors.RepositoryNotFoundError), "the hub has no such model, or not for you", "check the spelling"),
        (answer(errors.RevisionNotFoundError), "owner/name has no revision 'v2'", "--model owner/name"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be fetched (OfflineModeIsEnabled: offline)", "or a network"),
        (answer(errors.HfHubHTTPError), "cannot be fetched (HfHubHTTPError: an answer)", "or a network"),
        (OSError(28, "No space left on device"), "No space left on device", "or a network"),
        (ValueError("of a library"), "cannot be fetched (ValueError: of a library)", "or a network"),
    ],
)
def test_what_the_hub_does_not_give_is_named(cache, folder, monkeypatch, error, says, hint):
    Hub(monkeypatch, cache, folder, error)
    said = refusal(load_model, "owner/name@v2")
    assert says in said
    assert hint in said


def test_a_model_that_is_no_folder_of_diffusers_is_named(cache, folder, monkeypatch, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({}))
    hub = Hub(monkeypatch, cache, tmp_path / "other")
    assert "owner/name has no model_index.json" in refusal(local_path, "owner/name")
    assert hub.patterns is None, "nothing is fetched"
