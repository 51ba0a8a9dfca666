"""A model by its id on the hub: a folder in huggingface_hub's cache. Safetensors, JSON and texts only; no pickle."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import GazeError
from .files import STEM, read_json, weight_files
from .header import PICKLE_SUFFIXES

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*))?", re.ASCII)
INDEX = "model_index.json"
WEIGHTS = {"unet": STEM, "vae": STEM, "text_encoder": "model", "text_encoder_2": "model"}
FOLDERS = "|".join([*WEIGHTS, "scheduler", "tokenizer", "tokenizer_2"])
SMALL = re.compile(rf"{INDEX}|generation_config\.json|({FOLDERS})/[\w.-]+\.(json|txt)", re.ASCII)
CONFIG = "config.json"  # of a folder of transformers
OF_TRANSFORMERS = re.compile(r"[\w.-]+\.(json|txt|model)|model(-\d+-of-\d+)?\.safetensors", re.ASCII)
# Whole or in shards, the better first; as `weight_files` finds them.
VARIANTS = (r"{}(-\d+-of-\d+)?\.safetensors", r"{}(\.fp16|\.fp16-\d+-of-\d+|-\d+-of-\d+\.fp16)\.safetensors")


def local_path(model: str | Path) -> Path:
    """Where a model is on the disk. model: the path of a file or folder, or else an id on the hub, "owner/name" or
    "owner/name@revision", of which the cached copy is taken, without a look at the network, or one is fetched.

    A path that is neither there nor like an id is given back. Raises GazeError when a model of the hub cannot be had.
    """
    found = hub_id(model)
    return Path(model) if found is None else _cached(*found) or _fetched(*found, INDEX, wanted)


def transformers_path(model: str | Path) -> Path:
    """As `local_path`, of a folder that transformers' save_pretrained wrote, whose weights are model*.safetensors.

    Raises GazeError when it is not there, not whole, or has its weights in a pickle.
    """
    path, found = Path(model), hub_id(model)
    if found is not None:
        path = _snapshot(*found, CONFIG, _has_weights) or _fetched(*found, CONFIG, wanted_of_transformers)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise GazeError(f"model folder {str(model)!r} {problem}", "a folder, or the id of a model of the hub, owner/name")
    if not (path / CONFIG).is_file():
        raise GazeError(f"{path} has no {CONFIG}, so it is no model of transformers", "what save_pretrained wrote")
    missing = [file for file in weight_files(path, "model") if not file.is_file()]
    if missing:
        raise GazeError(f"{missing[0]} is missing", "copy the folder again; it may be incomplete")
    return path


def cached_path(model: str | Path) -> Path | None:
    """The cached copy that an id on the hub names, if there is one whole."""
    found = hub_id(model)
    return None if found is None else _cached(*found)


def hub_id(model: str | Path) -> tuple[str, str | None] | None:
    """The repository and the revision that an id on the hub names; None for a path, and for what is neither."""
    path, match = Path(model), ID.fullmatch(str(model))
    if os.path.exists(path) or match is None or path.suffix in (".safetensors", *PICKLE_SUFFIXES):
        return None
    return match[1], match[2]


def _cached(repo: str, revision: str | None) -> Path | None:
    return _snapshot(repo, revision, INDEX, _is_whole)


def _snapshot(repo: str, revision: str | None, index: str, is_whole: Callable[[Path], bool]) -> Path | None:
    """The cached copy, if there is one with its index, and whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # What else belongs to it, only the network or `is_whole` can say.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[index]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if is_whole(folder) else None


def _has_weights(folder: Path) -> bool:
    try:
        return (folder / CONFIG).is_file() and all(file.is_file() for file in weight_files(folder, "model"))
    except GazeError:
        return False


def _is_whole(folder: Path) -> bool:
    """Whether no file of a part is missing, as after a download that was cut off."""
    try:
        parts = [part for part, entry in read_json(folder / INDEX).items() if isinstance(entry, list) and all(entry)]
        needed = [path for part in WEIGHTS.keys() & parts for path in weight_files(folder / part, WEIGHTS[part])]
        needed += [folder / part / "config.json" for part in WEIGHTS.keys() & parts]
    except GazeError:
        return False
    return all(path.is_file() for path in needed)


def _fetched(repo: str, revision: str | None, index: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """index: the file without which it is another kind of model. choose: of the names of its files those to fetch."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        found = HfApi().model_info(repo, revision=revision)
        names = choose(file.rfilename for file in found.siblings or [])
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names)) if index in names else None
    except GatedRepoError:
        raise GazeError(
            f"{name} is for those who agreed to its terms", "agree on its page, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        problem = f"there is no file or folder {name!r}, and the hub has no such model, or not for you"
        raise GazeError(problem, "check the spelling; for a private model: hf auth login") from None
    except RevisionNotFoundError:
        raise GazeError(f"{repo} has no revision {revision!r}", f"--model {repo}, or another after the @") from None
    except Exception as error:  # of whichever library does the network
        problem = (
            f"there is no file or folder {name!r}, and as a model of the hub it is not in {constants.HF_HUB_CACHE}"
        )
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        hint = f"the path of a model, or a network; where there is one, hf download {repo} --local-dir FOLDER"
        raise GazeError(f"{problem} and cannot be fetched ({reason})", f"{hint}, then copy FOLDER") from None
    if folder is None:
        library = "diffusers" if index == INDEX else "transformers"
        raise GazeError(
            f"{name} has no {index}, so it is no {library} folder", "fetch its .safetensors and give the path"
        )
    return folder


def wanted(names: Iterable[str]) -> list[str]:
    """Of the files of a model, those that are read here; the fp16 variant of a part only where there is no other."""
    names = list(names)
    chosen = [name for name in names if SMALL.fullmatch(name)]
    for part, stem in WEIGHTS.items():
        kinds = [re.compile(f"{part}/{variant.format(stem)}", re.ASCII) for variant in VARIANTS]
        chosen += next(filter(None, ([name for name in names if kind.fullmatch(name)] for kind in kinds)), [])
    return chosen


def wanted_of_transformers(names: Iterable[str]) -> list[str]:
    """As `wanted`, for `transformers_path`."""
    return [name for name in names if OF_TRANSFORMERS.fullmatch(name)]
