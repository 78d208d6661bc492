"""A training sample: one conversation with its pictures, and where it comes from."""

from dataclasses import dataclass

from seekvl.processing.conversation import Conversation
from seekvl.runtime import SeekVLError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One conversation to learn from; what it looks like is a function of its source and id alone."""

    id: str
    """Name of the sample, unique within its source."""
    conversation: Conversation
    """Messages in turn, pictures as PIL images; answers are assistant messages, the last message is one."""
    source: str
    """The corpus that made it."""
    kind: str
    """What it asks about, such as "count"; "mixed" when its turns are of several kinds."""

    def __post_init__(self) -> None:
        """Refuse a sample without a name, and one that teaches nothing because it ends in no answer."""
        if not self.id:
            raise SeekVLError(f"a sample of source {self.source!r} has an empty id; give it a unique one")
        messages = self.conversation.messages
        if not messages or messages[-1].role != "assistant":
            last = messages[-1].role if messages else "nothing"
            raise SeekVLError(
                f"sample {self.id} ends with {last} after {len(messages)} messages; end with an answer"
            )
