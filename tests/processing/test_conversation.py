from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seekvl.processing.conversation import (
    Conversation,
    Message,
    Picture,
    Text,
    parse_messages,
)
from seekvl.processing.template import DEEPSEEK_VL2, prompt_text, render
from seekvl.runtime import SeekVLError

RED = Image.new("RGB", (4, 4), "red")
BLUE = Image.new("RGB", (4, 4), "blue")


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


def parts(messages: object) -> tuple[Text | Picture, ...]:
    return parse_messages(messages).messages[0].parts


def test_string_is_a_user_message() -> None:
    assert parse_messages("hi") == Conversation((Message("user", (Text("hi"),)),))


def test_a_conversation_passes_through() -> None:
    conversation = parse_messages("hi")
    assert parse_messages(conversation) is conversation


def test_parts_stand_where_they_stand() -> None:
    content = [
        {"type": "text", "text": "first"},
        {"type": "image", "image": RED},
        {"type": "text", "text": "then"},
        {"type": "image", "path": "b.png"},
        {"type": "image", "url": "http://x/c.png"},
        {"type": "image_url", "image_url": {"url": "data:,x", "detail": "high"}},
        {"type": "image_url", "image_url": "http://x/d.png"},
        {"type": "image", "image": Path("e.png")},
        {"type": "image", "image": bytearray(b"12")},
    ]
    kinds = [part.text if isinstance(part, Text) else part.source for part in parts([user(content)])]
    assert kinds == [
        "first",
        RED,
        "then",
        "b.png",
        "http://x/c.png",
        "data:,x",
        "http://x/d.png",
        Path("e.png"),
        b"12",
    ]


def test_neighbouring_texts_are_joined_by_a_space() -> None:
    assert parts([user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]) == (Text("a b"),)


def test_images_of_a_plain_string_go_in_front() -> None:
    message = {**user("is <image> this?"), "images": [RED, BLUE]}
    assert parts([message]) == (Picture(RED), Picture(BLUE), Text("is <image> this?"))


@pytest.mark.parametrize(
    ("role", "tag"),
    [("User", "<image_placeholder>"), ("User", "<image>"), ("<|User|>", "<image>")],
)
def test_official_form_puts_pictures_at_their_placeholders(role: str, tag: str) -> None:
    message = {"role": role, "content": f"a {tag}\nb {tag}", "images": [RED, BLUE]}
    conversation = parse_messages([message, {"role": role.replace("User", "Assistant"), "content": ""}])
    assert conversation.messages == (
        Message("user", (Text("a "), Picture(RED), Text("\nb "), Picture(BLUE)), control=True),
    )
    assert conversation.pictures == (Picture(RED), Picture(BLUE))


def test_official_form_without_placeholder_shows_pictures_first() -> None:
    assert parts([{"role": "User", "content": "a", "images": [RED]}]) == (Picture(RED), Text("a"))


def test_vl2_form_without_placeholder_ends_the_line_of_each_picture() -> None:
    message = {"role": "<|User|>", "content": "a", "images": [RED, BLUE]}
    assert parts([message]) == (Picture(RED), Text("\n"), Picture(BLUE), Text("\na"))


def test_plain_roles_with_as_many_tags_as_pictures_are_the_official_form_of_vl2() -> None:
    message = {**user("see <image> and <image>"), "images": [RED, BLUE]}
    assert parts([message]) == (Text("see "), Picture(RED), Text(" and "), Picture(BLUE))
    assert not parse_messages([message]).messages[0].control


def test_pictures_that_stand_where_a_plain_text_has_its_tags_end_no_line() -> None:
    message = {**user("<image><image> a"), "images": [RED, BLUE]}
    pieces = render(parse_messages([message]), template=DEEPSEEK_VL2)
    assert prompt_text(pieces) == "<|User|>: <image><image> a\n\n<|Assistant|>:"


def test_detail() -> None:
    content = [
        {"type": "image", "image": RED},
        {"type": "image", "image": RED, "detail": "low"},
        {"type": "image", "path": "a.png", "detail": "high"},
        {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:,x"}},
    ]
    details = [part.detail for part in parts([user(content)]) if isinstance(part, Picture)]
    assert details == ["auto", "low", "high", "low", "auto"]
    with pytest.raises(SeekVLError, match="'auto', 'low' or 'high', not 'fine'"):
        Picture(RED, "fine")


def test_short_tag_is_text_where_nothing_calls_for_it() -> None:
    assert parts([{"role": "User", "content": "what is <image> in HTML?"}]) == (
        Text("what is <image> in HTML?"),
    )


def test_system() -> None:
    assert parse_messages([user("a")]).system is None
    assert parse_messages([{"role": "system", "content": ""}, user("a")]).system == ""
    listed = {"role": "system", "content": [{"type": "text", "text": "be kind"}]}
    assert parse_messages([listed, user("a")]).system == "be kind"


def test_last_assistant_message_is_a_prefix() -> None:
    conversation = parse_messages([user("a"), {"role": "assistant", "content": "It is"}])
    assert [message.role for message in conversation.messages] == ["user", "assistant"]


BAD = {
    "empty list": ([], "the conversation is empty"),
    "only a system message": ([{"role": "system", "content": "x"}], "the conversation is empty"),
    "a single mapping": (user("a"), "must be a list of messages"),
    "a number": (3, "must be a list of messages"),
    "message that is a string": (["a"], "message 1 is str"),
    "unknown role": ([{"role": "tool", "content": "a"}], "message 1 has the unknown role 'tool'"),
    "no role": ([{"content": "a"}], "unknown role None"),
    "role in a list": ([{"role": ["user"], "content": "a"}], "unknown role"),
    "unknown key": ([{**user("a"), "name": "x"}], "message 1 has the unknown key 'name'"),
    "no content": ([{"role": "user"}], "message 1 has no content"),
    "content None": ([user(None)], "message 1 has no content"),
    "content a number": ([user(3)], "message 1 has content of int"),
    "content a mapping": ([user({"type": "text"})], "message 1 has content of dict"),
    "empty content": ([user("")], "turn 1 \\(user\\) is empty"),
    "blank content": ([user(" \n")], "turn 1 \\(user\\) is empty"),
    "no parts": ([user([])], "turn 1 \\(user\\) is empty"),
    "two user messages": ([user("a"), user("b")], "two user messages in a row"),
    "two assistant turns": (
        [user("a"), {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}],
        "two assistant messages in a row",
    ),
    "starts with the assistant": ([{"role": "assistant", "content": "a"}], "it starts with the assistant"),
    "empty answer in between": (
        [user("a"), {"role": "assistant", "content": ""}, user("b")],
        "turn 2 \\(assistant\\) is empty",
    ),
    "late system": ([user("a"), {"role": "system", "content": "b"}], "may only be the first message"),
    "system with a picture": (
        [{"role": "system", "content": [{"type": "image", "image": RED}]}, user("a")],
        "the system message holds a picture",
    ),
    "assistant with a picture": (
        [user("a"), {"role": "assistant", "content": [{"type": "image", "image": RED}]}],
        "only user messages may show pictures",
    ),
    "unknown part": ([user([{"type": "audio", "audio": "x"}])], "part 1 has the unknown type 'audio'"),
    "part without type": ([user([{"text": "x"}])], "part 1 has the unknown type None"),
    "part that is a string": ([user(["x"])], "part 1 is str"),
    "unknown part key": ([user([{"type": "text", "text": "x", "a": 1}])], "part 1 has the unknown key 'a'"),
    "text without text": ([user([{"type": "text"}])], "text without a string"),
    "image without source": ([user([{"type": "image"}])], "needs exactly one of image, url, path, and has 0"),
    "image with two": ([user([{"type": "image", "url": "a", "path": "b"}])], "and has 2"),
    "image None": ([user([{"type": "image", "image": None}])], "not NoneType"),
    "image_url without url": ([user([{"type": "image_url", "image_url": {}}])], "not NoneType"),
    "an unknown detail": (
        [user([{"type": "image", "image": RED, "detail": "fine"}])],
        "message 1, part 1 has the detail 'fine': use 'auto', 'low', 'high'",
    ),
    "an unknown detail of a URL": (
        [user([{"type": "image_url", "image_url": {"url": "data:,x", "detail": None}}])],
        "part 1 has the detail None",
    ),
    "a detail beside an image_url": (
        [user([{"type": "image_url", "image_url": {"url": "data:,x"}, "detail": "low"}])],
        "part 1 has the unknown key 'detail'",
    ),
    "an array": ([user([{"type": "image", "image": np.zeros((2, 2))}])], "PIL.Image.fromarray"),
    "images a string": ([{**user("a"), "images": "x.png"}], "'images' of str"),
    "images beside parts": (
        [{**user([{"type": "text", "text": "a"}]), "images": [RED]}],
        "both content parts and 'images'",
    ),
    "placeholder without picture": (
        [{"role": "User", "content": "<image_placeholder>a"}],
        "1 <image_placeholder> in its text but 0 pictures",
    ),
    "500 placeholders": (
        [{"role": "User", "content": "<image_placeholder>" * 500, "images": [RED]}],
        "500 <image_placeholder> in its text but 1 pictures",
    ),
    "short placeholder without picture": (
        [{"role": "<|User|>", "content": "<image>a"}],
        "1 <image> in its text but 0 pictures",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages(name: str) -> None:
    messages, expected = BAD[name]
    with pytest.raises(SeekVLError, match=expected) as caught:
        parse_messages(messages)
    assert "\n" not in str(caught.value)


def test_types_made_by_hand_are_checked_too() -> None:
    turn = Message("user", (Text("hi"),))
    for make, says in (
        (lambda: Text(5), "a string, not int"),
        (lambda: Message("user", "hi"), "Text and Picture, not str"),
        (lambda: Conversation((turn,), system=5), "a string or None, not int"),
        (lambda: Conversation(("hi",)), "turn 1 is str"),
    ):
        with pytest.raises(SeekVLError, match=says):
            make()
