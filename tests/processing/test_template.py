from PIL import Image

from seekvl.processing.conversation import Conversation, Message, Picture, Text
from seekvl.processing.template import DEEPSEEK, DEFAULT_SYSTEM, Piece, prompt_text, render, render_pairs
from seekvl.processing.tokenizer import EOS

RED = Picture(Image.new("RGB", (4, 4), "red"))


def say(*texts: str, system: str | None = "", control: bool = False) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(
        tuple(Message(roles[i % 2], (Text(text),), control=control) for i, text in enumerate(texts)), system
    )


def written(conversation: Conversation, *, complete: bool = False) -> str:
    return prompt_text(render(conversation, template=DEEPSEEK, complete=complete))


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
