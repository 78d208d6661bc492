"""What was used lately, up to so many bytes: pictures come again with every turn of a conversation."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Values by key; what was not used for longest goes first. For any number of threads.

    >>> recent = Recent[str, int](10)
    >>> recent.put("a", 1, size=6)
    >>> recent.put("b", 2, size=6)
    >>> recent.get("a"), recent.get("b"), recent.nbytes
    (None, 2, 6)
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Most bytes that are kept."""
        self.nbytes = 0
        self._held: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """Return a value, if it is here."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                return None
            self._held.move_to_end(key)
            return found[0]

    def put(self, key: Key, value: Value, *, size: int) -> None:
        """Keep a value of so many bytes, unless it alone exceeds the limit."""
        if size > self.limit:
            return
        with self._lock:
            self._drop(key)
            self._held[key] = value, size
            self.nbytes += size
            while self.nbytes > self.limit:
                self._drop(next(iter(self._held)))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._held.clear()
            self.nbytes = 0

    def _drop(self, key: Key) -> None:
        _, size = self._held.pop(key, (None, 0))
        self.nbytes -= size
