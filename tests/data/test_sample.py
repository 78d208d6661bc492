import pytest

from seekvl.data.sample import Sample
from seekvl.processing.conversation import Conversation, Message, Text
from seekvl.runtime import SeekVLError

ASK = Message("user", (Text("How many?"),))
ANSWER = Message("assistant", (Text("3"),))


def test_a_sample_keeps_what_it_is_given():
    conversation = Conversation((ASK, ANSWER))
    one = Sample(id="a", conversation=conversation, source="drawn", kind="count")
    assert (one.id, one.conversation, one.source, one.kind) == ("a", conversation, "drawn", "count")


def test_a_sample_without_a_last_answer_is_refused():
    with pytest.raises(SeekVLError, match="sample a ends with user after 1 messages"):
        Sample(id="a", conversation=Conversation((ASK,)), source="drawn", kind="count")


def test_a_sample_without_an_id_is_refused():
    with pytest.raises(SeekVLError, match="empty id"):
        Sample(id="", conversation=Conversation((ASK, ANSWER)), source="drawn", kind="count")
