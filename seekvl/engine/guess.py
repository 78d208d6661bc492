"""Guessing the next tokens from what was already said: prompt look-up.

    prompt and answer   ... the red cup and the blue   ...  the red
                             `-----'                         `-----' stood there before: guess "cup and the"

The words of a sign, the numbers of a box and the form of a list repeat themselves. A guess is checked by
feeding it: a step of a few tokens costs a CPU little more than a step of one, which reads the same weights.
What is chosen is what would be chosen without: a guess that is not chosen is cut off again, and every token
is drawn from the logits after the tokens that were chosen.
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2
"""Tokens that must have stood together before. One alone guesses wrong too often to pay."""

PATIENCE = 8
"""Wrong tokens in a row, beyond the right ones, after which guessing pauses."""

PAUSE = 64
"""Tokens of the answer without guesses before it is tried again."""


class Guesser:
    """The words of one prompt and answer, and how well guessing from them goes."""

    def __init__(self, prompt: Sequence[int], *, most: int) -> None:
        self.most = most
        """Most tokens of a guess; 0 guesses nothing."""
        self.guessed = 0
        """Tokens guessed so far."""
        self.right = 0
        """Those of them that were chosen."""
        self._ids = list(prompt)
        self._known = 0
        self._after: dict[tuple[int, ...], int] = {}
        self._credit = PATIENCE
        self._pause = 0

    def take(self, token: int) -> None:
        """Take down a token of the answer."""
        self._ids.append(token)
        self._pause = max(0, self._pause - 1)

    def guess(self, most: int) -> list[int]:
        """Return what may come next, at most so many tokens; often nothing."""
        most = min(most, self.most)
        if most < 1 or self._pause:
            return []
        self._learn()
        for size in range(LONGEST, SHORTEST - 1, -1):
            place = self._after.get(tuple(self._ids[-size:])) if len(self._ids) >= size else None
            if place is not None:
                return self._ids[place : place + most]
        return []

    def judge(self, *, guessed: int, right: int) -> None:
        """Take down how many tokens of a guess were chosen; too many wrong ones make a pause."""
        self.guessed += guessed
        self.right += right
        wrong = guessed - right
        self._credit = min(PATIENCE, self._credit + 2 * right - wrong)
        if self._credit <= 0:
            self._credit, self._pause = PATIENCE, PAUSE

    def _learn(self) -> None:
        """Remember, for the tokens in front of each new one, that it came next."""
        for place in range(self._known, len(self._ids)):
            for size in range(SHORTEST, min(LONGEST, place) + 1):
                self._after[tuple(self._ids[place - size : place])] = place
        self._known = len(self._ids)
