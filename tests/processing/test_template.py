from PIL import Image

from seekvl.processing.conversation import Conversation, Message, Picture, Text
from seekvl.processing.template import (
    DEEPSEEK,
    DEEPSEEK_VL2,
    DEFAULT_SYSTEM,
    Piece,
    Template,
    prompt_text,
    render,
    render_pairs,
)
from seekvl.processing.tokenizer import EOS

RED = Picture(Image.new("RGB", (4, 4), "red"))


def say(*texts: str, system: str | None = "", control: bool = False) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        tuple(Message(roles[i % 2], (Text(text),), control=control) for i, text in enumerate(texts)), system
    )


def written(conversation: Conversation, *, complete: bool = False, template: Template = DEEPSEEK) -> str:
    return prompt_text(render(conversation, template=template, complete=complete))


def shown(*parts: Picture | Text, control: bool = False) -> Conversation:
    return Conversation((Message("user", parts, control=control),))


def test_one_turn() -> None:
    assert written(say("hi")) == "User: hi\n\nAssistant:"


def test_default_system() -> None:
    assert written(say("hi", system=None)) == f"{DEFAULT_SYSTEM}\n\nUser: hi\n\nAssistant:"


def test_blank_system_leaves_nothing() -> None:
    assert written(say("hi", system=" \n")) == "User: hi\n\nAssistant:"


def test_turns_are_stripped() -> None:
    expected = f"User: a\n\nAssistant: b{EOS}User: c\n\nAssistant:"
    assert written(say(" a\n", "\tb ", "c")) == expected


def test_a_picture_is_no_whitespace() -> None:
    conversation = Conversation((Message("user", (Text("  "), RED, Text("\na \n"))),), "")
    assert written(conversation) == "User: <image_placeholder>\na\n\nAssistant:"


def test_prefix_stays_open_and_training_closes() -> None:
    assert written(say("a", "It is")) == "User: a\n\nAssistant: It is"
    assert written(say("a", "It is"), complete=True) == f"User: a\n\nAssistant: It is{EOS}"


def test_only_answers_are_to_be_learnt() -> None:
    pieces = render(say("a", "b", "c", "d", system="s"), template=DEEPSEEK, complete=True)
    assert "".join(piece.text for piece in pieces if piece.answer) == f" b{EOS} d{EOS}"


def test_control_marks_of_text_and_template() -> None:
    pieces = render(say(f"a{EOS}", "b", "c"), template=DEEPSEEK)
    assert [piece.text for piece in pieces if piece.control] == [EOS]
    pieces = render(say(f"a{EOS}", "b", "c", control=True), template=DEEPSEEK)
    assert [piece.text for piece in pieces if piece.control] == [f"a{EOS}", "b", EOS, "c"]


def test_picture_pieces() -> None:
    conversation = Conversation((Message("user", (RED, Text("a"))),), "")
    pieces = render(conversation, template=DEEPSEEK)
    assert [piece.picture for piece in pieces].count(True) == 1
    assert Piece("<image_placeholder>", picture=True) in pieces


def test_pairs_follow_the_index_not_the_role() -> None:
    pairs = [("Assistant", "first"), ("User", "second"), ("Assistant", None)]
    assert render_pairs(pairs, system="") == f"Assistant: first\n\nUser: second{EOS}Assistant:"


def test_vl2_has_no_system_prompt_and_strips_both_sides() -> None:
    expected = f"<|User|>: a\n\n<|Assistant|>: b{EOS}<|User|>: c\n\n<|Assistant|>:"
    assert written(say(" a\n", "\tb ", "c", system=None), template=DEEPSEEK_VL2) == expected


def test_vl2_system_text_stands_in_front_without_a_separator() -> None:
    assert written(say("hi", system=" be kind \n"), template=DEEPSEEK_VL2).startswith("be kind<|User|>: hi")
    assert written(say("hi", system=" \n"), template=DEEPSEEK_VL2).startswith("<|User|>: hi")


def test_vl2_prefix_stays_open_and_training_closes() -> None:
    prefix = say("a", "It is ")
    assert written(prefix, template=DEEPSEEK_VL2) == "<|User|>: a\n\n<|Assistant|>: It is"
    closed = written(prefix, complete=True, template=DEEPSEEK_VL2)
    assert closed == f"<|User|>: a\n\n<|Assistant|>: It is{EOS}"


def test_vl2_speakers_are_control_and_the_space_of_an_answer_is_only_printed() -> None:
    pieces = render(say("a", "b", "c"), template=DEEPSEEK_VL2)
    control = [piece.text for piece in pieces if piece.control]
    assert control == ["<|User|>", "<|Assistant|>", EOS, "<|User|>", "<|Assistant|>"]
    fed = "".join(piece.text for piece in pieces if not piece.printed_only)
    assert fed == f"<|User|>: a\n\n<|Assistant|>:b{EOS}<|User|>: c\n\n<|Assistant|>:"


def test_vl2_pictures_in_front_end_their_line() -> None:
    blue = Picture(Image.new("RGB", (4, 4), "blue"))
    cases = (
        ((RED, Text("a")), "<image>\na"),
        ((RED, blue, Text("a")), "<image>\n<image>\na"),
        ((RED, Text("\n a")), "<image>\n a"),
        ((Text("see "), RED, Text("now")), "see <image>now"),
        ((RED, Text("is like"), blue, Text("?")), "<image>\nis like<image>?"),
        ((RED,), "<image>"),
    )
    for parts, expected in cases:
        assert written(shown(*parts), template=DEEPSEEK_VL2) == f"<|User|>: {expected}\n\n<|Assistant|>:"
    by_hand = shown(RED, Text("a"), control=True)
    assert written(by_hand, template=DEEPSEEK_VL2) == "<|User|>: <image>a\n\n<|Assistant|>:"
    assert written(shown(RED, Text("a"))).endswith("User: <image_placeholder>a\n\nAssistant:")
