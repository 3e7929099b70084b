"""Read a large JSON file value by value with constant memory.

Existing streaming parsers stop at NaN, which Python writes to JSON and which files of this field contain. Values are
therefore decoded by the standard library from a window of the file.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from crysldnet.readers.structure_files import LIMIT

_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
MAX_BLANKS = 1 << 20
"""maximum consecutive blanks; more isn't a file of records"""
_BLANKS = f"over {MAX_BLANKS // 2**20} MiB of blanks in a row"


class Item(NamedTuple):
    """A value near the top of a file: an element of the top-level array, the value of a key of the top-level object, or
    an element of the array under the key ``data``.
    """

    key: str | None
    element: bool
    value: Any
    size: int = 0
    """characters of the value of a key"""


def top_level(stream: BinaryIO) -> Iterator[Item]:
    """Yield the values near the top of a JSON file.

    Raises:
        ValueError: the file isn't JSON, ends too early, or has a value of over 64 MiB.
    """
    window = _Window(stream)
    first = window.next()
    if first == "[":
        yield from (Item(None, True, value) for value in window.elements())
    elif first == "{":
        for key in window.members():
            if key == "data" and window.peek() == "[":
                window.next()
                yield from (Item(key, True, value) for value in window.elements())
            else:
                yield Item(key, False, window.value(), window.size)
    else:
        raise ValueError("it holds neither a list nor an object")
    if window.peek():
        raise ValueError("something follows after its end")


class _Window:
    """The part of a file in memory, and the reading position."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._raw_decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self.size = 0
        """characters of the last value"""

    def _more(self) -> bool:
        """Read more; False at the end of the file."""
        if self._ended:
            return False
        rest = self._text[self._at :]
        if len(rest) > LIMIT:
            raise ValueError(f"a value is not valid JSON, or longer than {LIMIT // 2**20} MiB")
        if len(rest) >= MAX_BLANKS and rest[-MAX_BLANKS:].isspace():
            raise ValueError(_BLANKS)
        block = self._stream.read(max(_BLOCK, len(rest)))
        self._ended = not block
        self._text, self._at = rest + self._decode(block, self._ended), 0
        return True

    def peek(self) -> str:
        """Return the next nonblank character, "" at the end."""
        skipped = 0
        while True:
            match = _SPACE.match(self._text, self._at)
            skipped += match.end() - self._at if match else 0
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if skipped > MAX_BLANKS:
                raise ValueError(_BLANKS)
            if not self._more():
                return ""

    def next(self) -> str:
        """Return that character and advance."""
        character = self.peek()
        self._at += 1
        return character

    def value(self) -> Any:
        """Return the next value."""
        self.peek()
        while True:
            try:
                value, end = self._raw_decode(self._text, self._at)
            except RecursionError as error:
                raise ValueError("a value is nested too deeply") from error
            except ValueError:
                if not self._more():
                    raise
                continue
            # a number at the end of the window may continue
            if end == len(self._text) and self._more():
                continue
            self.size, self._at = end - self._at, end
            return value

    def elements(self) -> Iterator[Any]:
        """Yield the elements of an array after its bracket."""
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if not self._goes_on("]"):
                return

    def members(self) -> Iterator[str]:
        """Yield the keys of an object after its brace; the caller reads each value."""
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            key = self.value()
            if not isinstance(key, str) or self.next() != ":":
                raise ValueError("a key or its colon is missing")
            yield key
            if not self._goes_on("}"):
                return

    def _goes_on(self, closing: str) -> bool:
        character = self.next()
        if character not in (",", closing) or not character:
            raise ValueError(f"',' or {closing!r} is missing" if character else "it ends too early")
        return character == ","
