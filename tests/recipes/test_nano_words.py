from pathlib import Path

from seekvl.corpus import nano as corpus
from seekvl.processing.template import DEEPSEEK_VL2, render
from seekvl.processing.tokenizer import GROUNDING_MARKS, VL2_ADDED, Tokenizer
from seekvl.recipes import nano, nano_moe
from seekvl.recipes.nano_words import VOCABULARY, _texts, train_tokenizer


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
        train_tokenizer(tmp_path / name, template=nano.TEMPLATE, specials=nano.SPECIALS, seed=3, samples=60)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_answers_of_the_second_family_begin_with_words_of_their_own(moe_words: Path) -> None:
    tokenizer = nano_moe.open_words(moe_words)
    assert pieces(tokenizer, "red circle") == ["red", " circle"]  # nothing stands before an answer there
    assert tokenizer.vocab_size <= VOCABULARY
    assert all(tokenizer.token_id(mark) is not None for mark in VL2_ADDED)
    assert pieces(tokenizer, " the red panel") == [" the", " red", " panel"]  # words of strips, too
    highest = tokenizer.token_id(VL2_ADDED[-1])
    assert highest == tokenizer.vocab_size - 1  # none of them had to be appended


def test_no_text_is_lost_or_joined_across_control_tokens() -> None:
    texts = list(_texts(0, 4, template=DEEPSEEK_VL2, specials=nano_moe.SPECIALS, draw=corpus.sample))
    assert not any(mark in text for text in texts for mark in nano_moe.SPECIALS)
    pieces = render(corpus.text_sample(0, 0).conversation, template=DEEPSEEK_VL2, complete=True)
    answers = [piece.text for piece in pieces if piece.answer and not piece.control and piece.text.strip()]
    assert answers
    assert all(answer in texts for answer in answers)
