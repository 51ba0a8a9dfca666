"""Using a model: pictures from prompts. Importing this package is light; torch comes with TextToImage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.text_to_image import TextToImage

__version__ = "0.1.0"
__all__ = ["TextToImage"]


def __getattr__(name: str) -> Any:
    if name == "TextToImage":
        from pipelines import text_to_image

        return getattr(text_to_image, name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
