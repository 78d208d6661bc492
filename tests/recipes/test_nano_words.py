from pathlib import Path

from seekvl.processing.tokenizer import GROUNDING_MARKS, Tokenizer
from seekvl.recipes.nano import TEMPLATE
from seekvl.recipes.nano_words import VOCABULARY, train_tokenizer


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_capitals_and_digits_stay_single_tokens(tokenizer: Tokenizer) -> None:
    assert pieces(tokenizer, " STOP") == [" ", "S", "T", "O", "P"]
    assert pieces(tokenizer, "[[120, 7, 999, 40]]") == [
        *("[[", "1", "2", "0", ", ", "7", ", ", "9", "9", "9", ", ", "4", "0", "]]")
    ]
    assert pieces(tokenizer, " red circle") == [" red", " circle"]


def test_the_tokenizer_writes_back_what_it_read(tokenizer: Tokenizer) -> None:
    text = "naïve café, 图片 🙂\n\tRead: STOP?\r\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(tokenizer.token_id(mark) is not None for mark in GROUNDING_MARKS)
    assert tokenizer.vocab_size <= VOCABULARY


def test_the_tokenizer_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(tmp_path / name, template=TEMPLATE, seed=3, samples=60)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
