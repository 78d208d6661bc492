import random
from pathlib import Path

import pytest

from seekvl.engine.reply import Reply, unfinished
from seekvl.processing.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_file(Path(__file__).parents[1] / "golden" / "vl1-siglip" / "tokenizer.json")


def run(text: str, *, stops: tuple[str, ...] = (), strip: bool = True) -> tuple[Reply, list[str]]:
    reply = Reply(TOKENIZER.stream(), stops=stops, strip=strip)
    pieces = []
    for token in TOKENIZER.encode(text):
        pieces.append(reply.push(token))
        if reply.stopped:
            break
    pieces.append(reply.finish())
    assert "".join(pieces) == reply.text
    return reply, pieces


def test_leading_whitespace_is_left_out_and_trailing_kept() -> None:
    assert run("  \n It is  red. \n")[0].text == "It is  red. \n"
    assert run(" \n ")[0].text == ""
    assert run(" red", strip=False)[0].text == " red"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "stopped"),
    [
        ("It is red.\n\nUser: next", ("User:",), "It is red.\n\n", True),
        ("It is red.", ("User:",), "It is red.", False),
        ("ends with Use", ("User:",), "ends with Use", False),
        ("aaab", ("aab",), "a", True),
        ("first second", ("second", "first"), "", True),
        ("one two three", ("three", "two"), "one ", True),
        (" \nrest", ("\n",), "rest", False),
        (" \nfirst\nrest", ("\n",), "first", True),
        (" yes or no", (" ",), "yes", True),
        ("图中有多少", ("多",), "图中有", True),
    ],
)
def test_the_text_ends_before_a_stop_string(
    text: str, stops: tuple[str, ...], expected: str, stopped: bool
) -> None:
    reply, _ = run(text, stops=stops)
    assert (reply.text, reply.stopped) == (expected, stopped)


def test_nothing_of_a_stop_string_is_ever_given_out() -> None:
    _, pieces = run("a User b User: c", stops=("User:",))
    given = ""
    for piece in pieces:
        given += piece
        assert "a User b ".startswith(given)


def test_any_tokens_join_to_their_decoding() -> None:
    draw = random.Random(5)
    for _ in range(50):
        ids = [draw.randrange(TOKENIZER.vocab_size + 20) for _ in range(30)]
        reply = Reply(TOKENIZER.stream(), strip=False)
        joined = "".join([reply.push(token) for token in ids]) + reply.finish()
        assert joined == reply.text == TOKENIZER.decode(ids)


def test_unfinished_counts_the_longest_beginning() -> None:
    assert unfinished("abab", ["abac", "b"]) == 2
    assert unfinished("", ["a"]) == 0
    assert unfinished("xyz", []) == 0
