"""A library's config.json read strictly: every option is read, or fixed, or ignored for a stated reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from .errors import GazeError, nearest

Self = TypeVar("Self", bound="Config")
LARGEST = 2**20  # of a number; more is a mistake, or meant to fill the memory
BLOCKS = 500  # of a network; the largest published has 65


@dataclass(frozen=True)
class Config:
    """Base of dataclasses whose fields are the options that are read, under their names in the file.

    NAME: how errors call the config. KIND: the entry of the file that says which class it describes.
    FIXED: options that have one supported value. IGNORED: options without effect here, and why. OWN: fields that the
    library does not know; they are written only where they are not at their defaults.
    """

    NAME: ClassVar[str]
    KIND: ClassVar[tuple[str, str]]
    FIXED: ClassVar[dict[str, Any]] = {}
    IGNORED: ClassVar[dict[str, str]] = {}
    OWN: ClassVar[tuple[str, ...]] = ()

    def check(self, good: bool, option: str, rule: str) -> None:
        """Raises GazeError unless `good`: the option's value breaks the rule."""
        if not good:
            raise GazeError(f"{self.NAME}: {option} is {getattr(self, option)!r}, but {rule}")

    def check_positive(self, *options: str) -> None:
        """Raises GazeError for the first of the options that is, or holds, a number that is not above zero."""
        for option in options:
            value = getattr(self, option)
            numbers = value if isinstance(value, tuple) else (value,)
            self.check(min(numbers, default=0) > 0, option, "it must be positive")

    def check_blocks(self, blocks: int, option: str) -> None:
        """Raises GazeError when a network would have so many blocks that even making it empty took long."""
        self.check(blocks <= BLOCKS, option, f"that makes {blocks} blocks; the most is {BLOCKS}")

    @classmethod
    def read(cls) -> set[str]:
        """The options that count."""
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def known(cls) -> set[str]:
        """The options that a config.json may have."""
        return {cls.KIND[0], *cls.read(), *cls.FIXED, *cls.IGNORED}

    @classmethod
    def from_diffusers(cls: type[Self], config: dict[str, Any]) -> Self:
        """Read the content of a config.json. GazeError: an option that is unknown or has an unsupported value."""
        entry, kind = cls.KIND
        if config.get(entry, kind) != kind:
            raise GazeError(f"{cls.NAME}: this is a {config[entry]}, not a {kind}")
        types = get_type_hints(cls)
        read = cls.read()
        options = {key: value for key, value in config.items() if key != entry and not key.startswith("_")}  # _: notes
        values = {}
        for key, value in options.items():
            if key not in cls.known():
                raise GazeError(f"{cls.NAME}: unknown option {key} = {value!r}", nearest(key, read))
            if key in cls.FIXED and value != cls.FIXED[key]:
                raise GazeError(f"{cls.NAME}: {key} = {value!r} is not supported, only {cls.FIXED[key]!r} is")
            if key in read:
                values[key] = tuple(value) if isinstance(value, list) else value
                if not _is_a(values[key], types[key]):
                    raise GazeError(f"{cls.NAME}: {key} = {value!r} is not of the type {types[key]}")
                numbers = values[key] if isinstance(values[key], tuple) else (values[key],)
                if any(isinstance(number, int) and number > LARGEST for number in numbers):
                    raise GazeError(f"{cls.NAME}: {key} = {value!r} is too large; the most is {LARGEST}")
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The content of a config.json that the library, where it knows all of it, and `from_diffusers` read."""
        usual = {field.name: field.default for field in dataclasses.fields(self) if field.name in self.OWN}
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in usual or v != usual[k]}
        return {self.KIND[0]: self.KIND[1], **self.FIXED, **values}


def _is_a(value: Any, hint: Any) -> bool:
    """isinstance for the types that options have: numbers, texts, None, tuples of one type, unions."""
    if get_origin(hint) is tuple:
        first, *others = get_args(hint)
        sized = isinstance(value, tuple) and (others == [Ellipsis] or len(value) == 1 + len(others))
        return sized and all(_is_a(item, first) for item in value)
    if get_args(hint):
        return any(_is_a(value, choice) for choice in get_args(hint))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint)
