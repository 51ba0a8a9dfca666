"""The models that come with the package, by name."""

import os
from pathlib import Path

MODELS = Path(__file__).parent / "models"
DEFAULT_MODEL = MODELS / "emoji"


def place_of(model: str | Path | None) -> str | Path:
    """Where a model is: the shipped one of this name, unless something here is called so; None: the default one.
    Everything else stays: a folder, a file or an id on the hub."""
    if model is None:
        return DEFAULT_MODEL
    names = [folder.name for folder in MODELS.iterdir()]
    return MODELS / model if str(model) in names and not os.path.exists(model) else model
