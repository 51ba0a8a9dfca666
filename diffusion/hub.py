"""A model by its id on the hub: a folder in huggingface_hub's cache. Safetensors, JSON and texts only; no pickle."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .errors import GazeError
from .files import STEM, read_json, weight_files
from .header import PICKLE_SUFFIXES

ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*))?", re.ASCII)
INDEX = "model_index.json"
WEIGHTS = {"unet": STEM, "vae": STEM, "text_encoder": "model", "text_encoder_2": "model"}
FOLDERS = "|".join([*WEIGHTS, "scheduler", "tokenizer", "tokenizer_2"])
SMALL = re.compile(rf"{INDEX}|generation_config\.json|({FOLDERS})/[\w.-]+\.(json|txt)", re.ASCII)
# Whole or in shards, the better first; as `weight_files` finds them.
VARIANTS = (r"{}(-\d+-of-\d+)?\.safetensors", r"{}(\.fp16|\.fp16-\d+-of-\d+|-\d+-of-\d+\.fp16)\.safetensors")
# What is read of a model of transformers: configs, the texts of tokenizers and chats, and weights.
READ = re.compile(r"[\w.-]+\.(json|txt|model|tiktoken|jinja)|model(-\d+-of-\d+)?\.safetensors", re.ASCII)


class Layout(NamedTuple):
    """A kind of model folder. index: the file that every one has. wanted: of the names of a model's files, those that
    are read here. needed: the files that a folder must have to be whole; raises GazeError where it cannot tell.
    kind, hint: what is said of a model of the hub without the index."""

    index: str
    wanted: Callable[[Iterable[str]], list[str]]
    needed: Callable[[Path], list[Path]]
    kind: str
    hint: str


def wanted(names: Iterable[str]) -> list[str]:
    """Of the files of a model, those that are read here; the fp16 variant of a part only where there is no other."""
    names = list(names)
    chosen = [name for name in names if SMALL.fullmatch(name)]
    for part, stem in WEIGHTS.items():
        kinds = [re.compile(f"{part}/{variant.format(stem)}", re.ASCII) for variant in VARIANTS]
        chosen += next(filter(None, ([name for name in names if kind.fullmatch(name)] for kind in kinds)), [])
    return chosen


def _needed(folder: Path) -> list[Path]:
    parts = [part for part, entry in read_json(folder / INDEX).items() if isinstance(entry, list) and all(entry)]
    files = [path for part in WEIGHTS.keys() & parts for path in weight_files(folder / part, WEIGHTS[part])]
    return files + [folder / part / "config.json" for part in WEIGHTS.keys() & parts]


DIFFUSERS = Layout(INDEX, wanted, _needed, "diffusers folder", "fetch its .safetensors and give the path")
TRANSFORMERS = Layout(
    "config.json",
    lambda names: [name for name in names if READ.fullmatch(name)],
    lambda folder: weight_files(folder, "model"),
    "model of transformers",
    "an id that transformers opens",
)


def local_path(model: str | Path, layout: Layout = DIFFUSERS) -> Path:
    """Where a model is on the disk. model: the path of a file or folder, or else an id on the hub, "owner/name" or
    "owner/name@revision", of which the cached copy is taken, without a look at the network, or one is fetched.

    A path that is neither there nor like an id is given back. Raises GazeError when a model of the hub cannot be had.
    """
    found = hub_id(model)
    return Path(model) if found is None else _cached(*found, layout) or _fetched(*found, layout)


def cached_path(model: str | Path) -> Path | None:
    """The cached copy that an id on the hub names, if there is one whole."""
    found = hub_id(model)
    return None if found is None else _cached(*found, DIFFUSERS)


def hub_id(model: str | Path) -> tuple[str, str | None] | None:
    """The repository and the revision that an id on the hub names; None for a path, and for what is neither."""
    path, match = Path(model), ID.fullmatch(str(model))
    if os.path.exists(path) or match is None or path.suffix in (".safetensors", *PICKLE_SUFFIXES):
        return None
    return match[1], match[2]


def _cached(repo: str, revision: str | None, layout: Layout) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # What else belongs to it, only the network or `needed` can say.
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=[layout.index]))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if _is_whole(folder, layout) else None


def _is_whole(folder: Path, layout: Layout) -> bool:
    """Whether no file is missing, as after a download that was cut off."""
    try:
        return all(path.is_file() for path in (folder / layout.index, *layout.needed(folder)))
    except GazeError:
        return False


def _fetched(repo: str, revision: str | None, layout: Layout) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = repo if revision is None else f"{repo}@{revision}"
    try:
        found = HfApi().model_info(repo, revision=revision)
        names = layout.wanted(file.rfilename for file in found.siblings or [])
        is_one = layout.index in names
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=names)) if is_one else None
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
        fetch = f"hf download {repo}{'' if revision is None else f' --revision {revision}'} --local-dir FOLDER"
        raise GazeError(
            f"{problem} and cannot be fetched ({reason})",
            f"the path of a model, or a network; where there is one: {fetch}, then copy FOLDER and give its path",
        ) from None
    if folder is None:
        raise GazeError(f"{name} has no {layout.index}, so it is no {layout.kind}", layout.hint)
    return folder
