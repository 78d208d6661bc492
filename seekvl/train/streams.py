"""The batch of a step from a language and a multimodal stream, as a function of the step number alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from seekvl.data.collate import Batch, collate
from seekvl.processing.encode import ModelInput
from seekvl.runtime import SeekVLError
from seekvl.train.schedule import LanguageShare, Place


class Source(Protocol):
    """An endless stream of encoded samples; sample `index` is the same whenever and wherever it is made."""

    def __call__(self, index: int) -> ModelInput:
        """Return sample `index`, counted from 0, encoded for training."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Streams:
    """Batches of one modality each, dealt from two streams by the language share (2403.05525, sec. 3.2.2).

    Calling it with a step number gives the batch of that step: samples k, k+1, ... of the stream whose turn
    it is, where k is the batch size times the earlier steps of that stream. A stage with one stream
    leaves the other None and gives no share.
    """

    batch_size: int
    """Samples a step."""
    lengths: tuple[int, ...]
    """Row lengths to pad to, tokens."""
    pad_id: int
    """Token id of the padding; it is never looked at."""
    parts: int = 1
    """Parts of rows of alike length that the language model takes one after the other, see `data.collate`:
    less padding for a CPU, smaller products for a GPU.
    """
    language: Source | None = None
    """Samples without pictures."""
    multimodal: Source | None = None
    """Samples with pictures; where steps may mix modalities, all samples."""
    share: LanguageShare | None = None
    """Needed with two streams."""

    def __post_init__(self) -> None:
        given = [source for source in (self.language, self.multimodal) if source is not None]
        if not given:
            raise SeekVLError("streams need a language source, a multimodal source, or both")
        if (len(given) == 2) != (self.share is not None):
            raise SeekVLError(
                f"{len(given)} streams with language share {self.share}: two need a share, one takes none"
            )
        if self.batch_size < 1:
            raise SeekVLError(f"streams: batch_size is {self.batch_size}; it must be at least 1")
        if not 1 <= self.parts <= self.batch_size:
            raise SeekVLError(f"streams: {self.parts} parts of a batch of {self.batch_size} samples")

    def place(self, step: int) -> Place:
        """Return stream and stream position of a step."""
        if self.share is None:
            return Place(language=self.language is not None, index=step)
        return self.share.place(step)

    def kind(self, step: int) -> str:
        """Return "language" or "multimodal", the name under which the log keeps the loss of a step."""
        return "language" if self.place(step).language else "multimodal"

    def samples(self, step: int) -> Sequence[int]:
        """Return the stream indices of the samples of a step."""
        first = self.place(step).index * self.batch_size
        return range(first, first + self.batch_size)

    def __call__(self, step: int) -> Batch:
        """Return the batch of a step."""
        source = self.language if self.place(step).language else self.multimodal
        assert source is not None
        inputs = [source(index) for index in self.samples(step)]
        try:
            return collate(inputs, lengths=self.lengths, pad_id=self.pad_id, parts=self.parts)
        except SeekVLError as error:
            samples = self.samples(step)
            raise SeekVLError(f"{self.kind(step)} samples {samples[0]} to {samples[-1]}: {error}") from error
