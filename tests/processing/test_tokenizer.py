import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from seekvl.processing.tokenizer import (
    BOS,
    EOS,
    GROUNDING_MARKS,
    IMAGE,
    VL2_ADDED,
    VL2_IMAGE,
    VL2_PAD,
    Tokenizer,
)
from seekvl.runtime import SeekVLError

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = GOLDEN / "vl1-siglip" / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(FILE)


def changed(path: Path, change: Any) -> Path:
    content = json.loads(FILE.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def with_marks(content: dict[str, Any]) -> None:
    for number, mark in enumerate(GROUNDING_MARKS):
        content["added_tokens"].append({**content["added_tokens"][0], "id": 684 + number, "content": mark})


def test_specials_in_text_are_letters(tokenizer: Tokenizer) -> None:
    text = f"a{EOS}b{IMAGE}c{BOS}<patch_placeholder>"
    ids = tokenizer.encode(text)
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.image_id, 683} & set(ids)
    assert tokenizer.decode(ids) == text


def test_specials_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOS}b{IMAGE}{IMAGE}", specials=True)
    assert ids == [64, tokenizer.eos_id, 65, tokenizer.image_id, tokenizer.image_id]
    assert tokenizer.split(f"a{EOS}b") == ["a", tokenizer.eos_id, "b"]
    assert tokenizer.split("") == []


def test_specials_as_the_backend_has_them(tokenizer: Tokenizer) -> None:
    backend = Backend.from_file(str(FILE))
    rng = random.Random(0)
    words = [
        BOS,
        EOS,
        IMAGE,
        "<patch_placeholder>",
        " ",
        "\n",
        "hello",
        "图",
        "<",
        "｜",
        "<image_placeholder",
        "1",
    ]
    for _ in range(300):
        text = "".join(rng.choice(words) for _ in range(8))
        expected = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, specials=True) == expected, repr(text)


def test_a_worker_process_keeps_text_as_data(tokenizer: Tokenizer) -> None:
    travelled = pickle.loads(pickle.dumps(tokenizer))
    assert travelled.encode(f"a{EOS}") == tokenizer.encode(f"a{EOS}")
    assert travelled.encode(f"a{EOS}", specials=True) == [64, tokenizer.eos_id]


def test_grounding_marks_are_words(tmp_path: Path, tokenizer: Tokenizer) -> None:
    marked = Tokenizer.from_file(changed(tmp_path / "tokenizer.json", with_marks))
    text = f"<|ref|>dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>{EOS}"
    ids = marked.encode(text)
    assert [token for token in ids if token >= 680] == [684, 685, 686, 687]
    assert marked.decode(ids) == text
    assert marked.encode(text, specials=True) == [*ids[: ids.index(687) + 1], marked.eos_id]
    assert marked.decode([marked.eos_id, 684, marked.image_id]) == "<|ref|>"
    assert marked.token_id("<|grounding|>") == 688
    assert tokenizer.token_id("<|grounding|>") is None
    assert max(tokenizer.encode(text)) < 680


def test_added_specials_follow_the_highest_id(tmp_path: Path, tokenizer: Tokenizer) -> None:
    vl2 = Tokenizer.from_file(FILE, image=VL2_IMAGE, pad=VL2_PAD, added=VL2_ADDED)
    assert [vl2.token_id(name) for name in VL2_ADDED] == list(range(684, 693))
    assert vl2.vocab_size == tokenizer.vocab_size + 9
    assert (vl2.pad_id, vl2.image_id) == (684, 685)
    text = "<|User|>: <image><|ref|>a<|/ref|>"
    assert [token for token in vl2.encode(text) if token >= 680] == [686, 687]
    assert [token for token in vl2.encode(text, specials=True) if token >= 680] == [691, 685, 686, 687]
    assert vl2.decode([691, 686, 64, 687]) == "<|ref|>a<|/ref|>"
    path = changed(tmp_path / "tokenizer.json", with_marks)
    marked = Tokenizer.from_file(path, image=VL2_IMAGE, pad=VL2_PAD, added=VL2_ADDED)
    assert [marked.token_id(name) for name in VL2_ADDED] == [689, 690, 684, 685, 686, 687, 688, 691, 692]


def test_an_added_special_the_file_has_as_a_word_is_special(tmp_path: Path) -> None:
    def with_word(content: dict[str, Any]) -> None:
        first = content["added_tokens"][0]
        content["added_tokens"].append({**first, "id": 684, "content": VL2_IMAGE, "special": False})

    path = changed(tmp_path / "tokenizer.json", with_word)
    with pytest.raises(SeekVLError, match="no special token '<image>'"):
        Tokenizer.from_file(path, image=VL2_IMAGE)
    known = Tokenizer.from_file(path, image=VL2_IMAGE, added=(VL2_IMAGE,))
    assert known.image_id == 684
    assert 684 not in known.encode("<image>")


def test_a_worker_process_keeps_added_specials(tokenizer: Tokenizer) -> None:
    vl2 = Tokenizer.from_file(FILE, image=VL2_IMAGE, pad=VL2_PAD, added=VL2_ADDED)
    travelled = pickle.loads(pickle.dumps(vl2))
    for specials in (True, False):
        text = "<|User|>: <image><|det|>"
        assert travelled.encode(text, specials=specials) == vl2.encode(text, specials=specials)


def test_decode_equals_the_backend_and_the_stream(tokenizer: Tokenizer) -> None:
    """Random ids give mostly invalid UTF-8: the pieces must still join to the whole, letter by letter."""
    backend = Backend.from_file(str(FILE))
    rng = random.Random(7)
    for _ in range(4000):
        ids = [rng.choice((rng.randrange(256), rng.randrange(690))) for _ in range(rng.randrange(14))]
        for skip in (True, False):
            whole = tokenizer.decode(ids, skip_specials=skip)
            assert whole == backend.decode(ids, skip_special_tokens=skip), ids
            stream = tokenizer.stream(skip_specials=skip)
            assert "".join(stream.push(token) for token in ids) + stream.flush() == whole, ids


def test_stream_holds_back_half_letters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀 é")
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert len(ids) > len("😀 é")
    assert "".join(pieces) == "😀 é"
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.flush() == ""


def test_stream_gives_up_on_impossible_letters(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("😀")
    stream = tokenizer.stream()
    assert stream.push(first) == ""
    assert stream.push(64) == "\ufffda"
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.push(64) == "a"


def test_round_trip_of_any_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    letters = "aZ09 \n\t\r.,!äßéИ中文字한😀\u200b\u0301<|｜▁>\\\"'"
    for _ in range(500):
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(20)))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_rows_beyond_the_vocabulary_print_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([64, 690, 65]) == "ab"
    with pytest.raises(SeekVLError, match="token id -1 is negative"):
        tokenizer.decode([-1])


def test_starts(tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_with_starts("a 😀b")
    assert encoded.starts[0] == 0
    assert encoded.starts == sorted(encoded.starts)
    assert encoded.starts[-1] == 3


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(SeekVLError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_missing_specials_are_named(tmp_path: Path) -> None:
    for name in (BOS, EOS, IMAGE):
        path = changed(
            tmp_path / "tokenizer.json",
            lambda content, name=name: content.update(
                added_tokens=[token for token in content["added_tokens"] if token["content"] != name]
            ),
        )
        with pytest.raises(SeekVLError, match=name):
            Tokenizer.from_file(path)
    with pytest.raises(SeekVLError, match="'<pad>' for padding"):
        Tokenizer.from_file(FILE, pad="<pad>")


def test_other_names(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_file(FILE, bos=EOS, eos=BOS, image="<patch_placeholder>", pad=IMAGE)
    assert (other.bos_id, other.eos_id) == (tokenizer.eos_id, tokenizer.bos_id)
    assert (other.image_id, other.pad_id) == (683, tokenizer.image_id)
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize("content", ["", "{}", "[]", "nonsense", '{"decoder": null, "added_tokens": []}'])
def test_files_that_are_no_tokenizers(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(SeekVLError, match=r"tokenizer .*tokenizer.json: not a tokenizer.json"):
        Tokenizer.from_file(path)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "none.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(SeekVLError, match="cannot be read"):
        Tokenizer.from_file(tmp_path / "binary")


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    path = changed(
        tmp_path / "tokenizer.json",
        lambda content: content.update(
            decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        ),
    )
    with pytest.raises(SeekVLError, match="not ByteLevel"):
        Tokenizer.from_file(path)
