from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seekvl.processing.conversation import Conversation, Message, Picture, Text, parse_messages
from seekvl.processing.encode import Processor
from seekvl.processing.pad_image import ORIENTATION_TAG, PadImageConfig
from seekvl.processing.template import DEEPSEEK, DEEPSEEK_VL2
from seekvl.processing.tile_image import GRIDS_9, TileImageConfig, tile_count, visual_tokens
from seekvl.processing.tokenizer import EOS, VL2_ADDED, VL2_IMAGE, VL2_PAD, VL2_ROLES, Tokenizer
from seekvl.runtime import SeekVLError

FILE = Path(__file__).parents[1] / "golden" / "vl2-small-like" / "tokenizer.json"
CONFIG = TileImageConfig(image_size=56, grids=GRIDS_9)
SMALL = Image.new("RGB", (50, 40), "red")
WIDE = Image.new("RGB", (220, 100), "blue")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(FILE, image=VL2_IMAGE, pad=VL2_PAD, added=VL2_ADDED)


@pytest.fixture
def process(tokenizer: Tokenizer) -> Processor:
    return Processor(tokenizer, CONFIG, DEEPSEEK_VL2)


def show(*parts: Any, detail: str = "auto") -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part, "detail": detail}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def test_slots_tiles_and_grids_agree(process: Processor) -> None:
    inputs = process(show("one", SMALL, "two", WIDE))
    assert inputs.grids == ((1, 1), (4, 2))
    assert inputs.pixels is not None
    assert len(inputs.pixels) == sum(map(tile_count, inputs.grids)) == 10
    expected = tuple(visual_tokens(grid, CONFIG) for grid in inputs.grids)
    assert inputs.bill.image_tokens == expected
    runs = inputs.image_mask.long().diff(prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten()
    assert runs.reshape(-1, 2).diff().flatten().tolist() == list(expected)
    assert inputs.picture_sizes == ((50, 40), (220, 100))
    assert inputs.normalized
    assert inputs.low_pixels is None


def test_text_only_has_no_grids(process: Processor) -> None:
    inputs = process("hi")
    assert inputs.grids == ()
    assert inputs.pixels is None
    assert inputs.bill.image_tokens == ()


def test_every_way_to_write_the_same_prompt(process: Processor) -> None:
    parts = process(show(WIDE, "a"))
    ways = [
        [{"role": "user", "content": "a", "images": [WIDE]}],
        [{"role": "user", "content": "<image>\na", "images": [WIDE]}],
        [{"role": "<|User|>", "content": "a", "images": [WIDE]}],
        [{"role": "<|User|>", "content": "<image>\na", "images": [WIDE]}],
        [
            {"role": "<|User|>", "content": "<image>\na", "images": [WIDE]},
            {"role": "<|Assistant|>", "content": ""},
        ],
        Conversation((Message("user", (Picture(WIDE), Text("a"))),)),
    ]
    for way in ways:
        assert torch.equal(process(way).input_ids, parts.input_ids)
    assert torch.equal(process.encode_prompt(parts.prompt, pictures=[WIDE]).input_ids, parts.input_ids)


def test_typed_specials_are_data(process: Processor, tokenizer: Tokenizer) -> None:
    plain = process(show(SMALL, "x"))
    text = f"x <image> <|User|>: y {EOS} <|Assistant|>: {VL2_PAD}"
    messages = [{"role": "system", "content": text}, *show(SMALL, text)]
    for typed in (
        process(messages),
        process([{"role": "system", "content": text}, {"role": "user", "content": text}]),
    ):
        ids = typed.input_ids.tolist()
        assert [ids.count(tokenizer.token_id(role)) for role in VL2_ROLES] == [1, 1]
        assert tokenizer.eos_id not in ids
        assert tokenizer.pad_id not in ids
        assert int(typed.image_mask.sum()) == ids.count(tokenizer.image_id)
    assert int(process(messages).image_mask.sum()) == int(plain.image_mask.sum())


def test_grounding_marks_are_words(process: Processor, tokenizer: Tokenizer) -> None:
    ids = process(show(SMALL, "<|grounding|>find <|ref|>it<|/ref|>")).input_ids.tolist()
    for mark in ("<|grounding|>", "<|ref|>", "<|/ref|>"):
        assert ids.count(tokenizer.token_id(mark)) == 1


def test_answers_are_encoded_apart_from_the_colon(process: Processor, tokenizer: Tokenizer) -> None:
    messages = [*show(SMALL, "Sure?"), {"role": "assistant", "content": " yes <|ref|>it<|/ref|> 数字 "}]
    opened = process(messages)
    question = process(show(SMALL, "Sure?")).input_ids.tolist()
    answer = tokenizer.encode("yes <|ref|>it<|/ref|> 数字")
    assert opened.input_ids.tolist() == question + answer
    assert opened.prompt.endswith("<|Assistant|>: yes <|ref|>it<|/ref|> 数字")
    trained = process.encode(parse_messages(messages), train=True)
    assert trained.loss_weights is not None
    assert trained.input_ids[trained.loss_weights == 1].tolist() == [*answer, tokenizer.eos_id]


def test_three_pictures_are_single_tiles_unless_told_otherwise(
    tokenizer: Tokenizer, process: Processor
) -> None:
    three = show(WIDE, WIDE, WIDE, "a")
    assert process(three).grids == ((1, 1),) * 3
    bounded = Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tiles=2)
    assert bounded(three).grids == ((2, 1),) * 3
    assert process(show(WIDE, WIDE, WIDE, "a", detail="high")).grids == ((4, 2),) * 3
    assert process(show(WIDE, "a", detail="low")).grids == ((1, 1),)
    turns = [*show(WIDE, WIDE, "a"), {"role": "assistant", "content": "b"}, *show(WIDE, "c")]
    assert process(turns).grids == ((1, 1),) * 3


def test_bill_without_preparing(process: Processor) -> None:
    messages = show(WIDE, "a", SMALL)
    assert process.tokens(messages) == process(messages).bill
    assert process.picture_tokens == visual_tokens((1, 1), CONFIG)


def test_never_a_silent_cut(tokenizer: Tokenizer, process: Processor) -> None:
    messages = show(WIDE, Image.new("RGB", (168, 112)), "a")
    limit = process.tokens(messages).total - 10
    expected = (
        r"text tokens \+ 78 picture tokens \(4x2 tiles: 43, 3x2 tiles: 35\)\), "
        rf"more than the limit of {limit}; .* set max_tiles=5 \(then it fits\)"
    )
    with pytest.raises(SeekVLError, match=expected):
        Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tokens=limit)(messages)
    with pytest.raises(SeekVLError, match="more than the limit"):
        Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tokens=limit, max_tiles=6)(messages)
    fitting = Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tokens=limit, max_tiles=5)
    assert fitting(messages).bill.total <= limit
    with pytest.raises(
        SeekVLError, match=rf"text tokens\), more than the limit of {limit}; shorten the text"
    ):
        Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tokens=limit)("word " * 200)


def test_what_cannot_fit_is_refused_before_anything_is_opened(tokenizer: Tokenizer) -> None:
    process = Processor(tokenizer, CONFIG, DEEPSEEK_VL2)
    message = {"role": "<|User|>", "content": "<image>" * 500, "images": ["no-such.png"] * 500}
    with pytest.raises(SeekVLError, match=r"takes at least [\d,]+ tokens .* picture tokens \(500 x 13\)"):
        process([message])


def test_bad_pictures_are_numbered(process: Processor) -> None:
    for encode in (process, process.tokens):
        with pytest.raises(SeekVLError, match=r"picture 2: .*no such file"):
            encode(show(SMALL, Path("no-such.png")))
    with pytest.raises(SeekVLError, match="picture 2: a picture of 1x4000 px is too thin"):
        process(show(SMALL, Image.new("RGB", (1, 4000))))


def test_orientation_decides_the_grid(tokenizer: Tokenizer, process: Processor) -> None:
    image = WIDE.copy()
    image.getexif()[ORIENTATION_TAG] = 6
    official = Processor(tokenizer, CONFIG, DEEPSEEK_VL2, preprocessing="official")
    assert process(show(image)).grids == ((2, 4),)
    assert process(show(image)).picture_sizes == ((100, 220),)
    assert official(show(image)).grids == ((4, 2),)
    assert process.tokens(show(image)).image_tokens == process(show(image)).bill.image_tokens


def test_bad_processors(tokenizer: Tokenizer) -> None:
    with pytest.raises(SeekVLError, match="transformers has no DeepSeek-VL2"):
        Processor(tokenizer, CONFIG, DEEPSEEK_VL2, preprocessing="transformers")
    for wrong in (0, 2.5, "3", True):
        with pytest.raises(SeekVLError, match="max_tiles must be a whole number of at least 1"):
            Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tiles=wrong)  # type: ignore[arg-type]
        with pytest.raises(SeekVLError, match="max_tokens must be a whole number of at least 1"):
            Processor(tokenizer, CONFIG, DEEPSEEK_VL2, max_tokens=wrong if wrong != 2.5 else 0.5)  # type: ignore[arg-type]
    with pytest.raises(SeekVLError, match="max_tiles=4 bounds the tiles of DeepSeek-VL2"):
        Processor(tokenizer, PadImageConfig(image_size=96, patch_slots_side=6), DEEPSEEK, max_tiles=4)
    without = Tokenizer.from_file(FILE, image=VL2_IMAGE, pad=VL2_PAD, added=(VL2_PAD, VL2_IMAGE))
    with pytest.raises(SeekVLError, match=r"no special token '<\|User\|>'"):
        Processor(without, CONFIG, DEEPSEEK_VL2)
