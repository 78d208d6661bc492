"""The text of an answer as it grows: whole letters, no leading whitespace, nothing from a stop string on."""

from collections.abc import Sequence

from seekvl.processing.tokenizer import TextStream


class Reply:
    """Collects an answer token by token. What it gives back, joined, is `text`."""

    def __init__(self, stream: TextStream, *, stops: Sequence[str] = (), strip: bool = True) -> None:
        self._stream = stream
        self._stops = tuple(stops)
        self._strip = strip
        self._held = ""
        self.text = ""
        self.stopped = False
        """Whether a stop string was met."""

    def push(self, token: int) -> str:
        """Take a token; return the letters that are final now."""
        return self._add(self._stream.push(token), last=False)

    def finish(self) -> str:
        """Return what was held back, when no token follows."""
        return self._add(self._stream.flush(), last=True)

    def _add(self, letters: str, *, last: bool) -> str:
        """Release decoded letters, except those that a stop string forbids or might still begin with."""
        if self.stopped:
            return ""
        self._held += letters
        if self._strip and not self.text:  # a stop string of blanks means those that are seen
            self._held = self._held.lstrip()
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            end = min(found)
        else:
            end = len(self._held) - (0 if last else unfinished(self._held, self._stops))
        released, self._held = self._held[:end], self._held[end:]
        self.text += released
        return released


def unfinished(text: str, stops: Sequence[str]) -> int:
    """Count the letters at the end of a text that may be the beginning of a stop string.

    >>> unfinished("The Us", ["User:"])
    2
    """
    longest = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), longest, -1):
            if text.endswith(stop[:size]):
                longest = size
                break
    return longest
