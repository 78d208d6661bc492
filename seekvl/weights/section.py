"""A published JSON file read value by value: each has a type and perhaps a default; what is left over is an
error.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

from seekvl.runtime import SeekVLError

LARGEST = 1_000_000_000
"""No dimension, count or id of a network is above this."""
DEEPEST = 1_000
"""No tower or language model has more layers."""


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file; SeekVLError when it is missing, empty, broken or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SeekVLError(
            f"{path.parent} has no {path.name}: download the whole checkpoint folder"
        ) from error
    except IsADirectoryError as error:
        raise SeekVLError(f"{path} is a folder, a JSON file is expected") from error
    except UnicodeDecodeError as error:
        raise SeekVLError(f"{path} is not UTF-8 text (byte {error.start}): download it again") from error
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        what = "is empty" if not text.strip() else f"is not JSON (line {error.lineno}: {error.msg})"
        raise SeekVLError(f"{path} {what}: download it again") from error
    except ValueError as error:  # a number of thousands of digits
        raise SeekVLError(f"{path} is not JSON that can be read ({error}): download it again") from error
    except RecursionError as error:
        raise SeekVLError(f"{path} is nested too deeply to be a published file") from error
    if not isinstance(value, dict):
        raise SeekVLError(f"{path} holds a JSON {type(value).__name__}, an object is expected")
    return value


class Section:
    """One JSON object of a published file, which knows where it stands and which of its keys were read."""

    def __init__(self, values: Mapping[str, object], *, where: str) -> None:
        self.values = values
        self.where = where
        self.read: set[str] = set()

    @classmethod
    def of_file(cls, path: Path) -> "Section":
        """Open a file as a section."""
        return cls(read_json(path), where=str(path))

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def integer(self, key: str, default: int | None = None, *, most: int = LARGEST) -> int:
        """Return a whole number of 0 to `most`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self._wrong(key, f"a whole number of 0 to {most:,}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number."""
        value = self._value(key, default)
        if not _is_number(value):
            raise self._wrong(key, "a finite number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def flag(self, key: str, default: bool | None = None) -> bool:
        """Return true or false."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def numbers(self, key: str) -> tuple[float, ...] | None:
        """Return a list of numbers, None where the key is absent or null."""
        value = self._optional(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(map(_is_number, value)):
            raise self._wrong(key, "a list of finite numbers")
        return tuple(float(x) for x in value)

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """Return a list of whole numbers."""
        value = self.numbers(key)
        if value is None:
            return default
        if any(x != int(x) for x in value):
            raise self._wrong(key, "a list of whole numbers")
        return tuple(int(x) for x in value)

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        """Return a list of pairs of whole numbers above 0."""
        value = self._value(key, None)
        if not isinstance(value, list) or not value or not all(_is_pair(entry) for entry in value):
            raise self._wrong(key, "a list of pairs of whole numbers above 0")
        return tuple((entry[0], entry[1]) for entry in value)

    def rgb(self, key: str) -> tuple[float, float, float] | None:
        """Return one number for each colour channel, None where the key is absent or null."""
        value = self.numbers(key)
        if value is None:
            return None
        if len(value) != 3:
            raise self._wrong(key, "three numbers, one for each colour channel")
        return value[0], value[1], value[2]

    def section(self, key: str) -> "Section":
        """Return the object below a key."""
        value = self._value(key, None)
        if not isinstance(value, dict):
            raise self._wrong(key, "an object")
        return Section(value, where=f"{self.where}: {key}")

    def section_if_any(self, key: str) -> "Section | None":
        """Return the object below a key, None where the key is absent or null."""
        return None if self._optional(key) is None else self.section(key)

    def must_be(self, expected: Mapping[str, object]) -> None:
        """Refuse another value under these keys; an absent key means the expected value."""
        for key, wanted in expected.items():
            if key in self.values and self._optional(key) != wanted:
                raise SeekVLError(
                    f"{self.where}: {key} is {json.dumps(self.values[key])[:60]}; seekvl computes "
                    f"{json.dumps(wanted)} only"
                )

    def finish(self, ignored: Mapping[str, str]) -> None:
        """Refuse every key that was not read and is not listed, with its reason, as ignored."""
        left = [key for key in self.values if key not in self.read and key not in ignored]
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise SeekVLError(
                f"{self.where}: unknown keys {', '.join(left[:3])}{more}; they may change the network, so "
                "nothing is guessed"
            )

    def _optional(self, key: str) -> object:
        self.read.add(key)
        return self.values.get(key)

    def _value(self, key: str, default: object) -> object:
        value = self._optional(key)
        if value is None:
            if default is None:
                raise SeekVLError(f"{self.where}: {key} is missing")
            return default
        return value

    def _wrong(self, key: str, expected: str) -> SeekVLError:
        return SeekVLError(
            f"{self.where}: {key} is {json.dumps(self.values.get(key))[:60]}, expected {expected}"
        )


def _is_number(value: object) -> TypeGuard[int | float]:
    """Tell whether a value is a number that a float can hold."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # NaN is not
    )


def _is_pair(value: object) -> bool:
    """Tell whether a value is a list of two whole numbers above 0."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(x, int) and not isinstance(x, bool) and x > 0 for x in value)
    )
