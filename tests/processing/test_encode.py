from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import seekvl
from seekvl.engine.pictures import picture_digests
from seekvl.processing import encode
from seekvl.processing.conversation import Conversation, Message, Picture, Text, parse_messages
from seekvl.processing.encode import Processor
from seekvl.processing.pad_image import PadImageConfig
from seekvl.processing.template import DEEPSEEK
from seekvl.processing.tokenizer import EOS, IMAGE, Tokenizer
from seekvl.runtime import SeekVLError

GOLDEN = Path(__file__).parents[1] / "golden"
IMAGE_CONFIG = PadImageConfig(image_size=96, patch_slots_side=6)
RED = Image.new("RGB", (60, 40), "red")
BLUE = Image.new("RGB", (30, 90), "blue")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(GOLDEN / "vl1-siglip" / "tokenizer.json")


@pytest.fixture
def process(tokenizer: Tokenizer) -> Processor:
    return Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK)


def show(*parts: Any) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]


def test_text_only(process: Processor) -> None:
    inputs = process("hi")
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.input_ids[0] == process.tokenizer.bos_id
    assert process.tokenizer.decode(inputs.input_ids.tolist()) == inputs.prompt
    assert inputs.pixels is None
    assert inputs.low_pixels is None
    assert inputs.loss_weights is None
    assert not inputs.image_mask.any()
    assert inputs.picture_sizes == ()
    assert not inputs.normalized


def test_interleaved_pictures(process: Processor) -> None:
    inputs = process(show("one", RED, "two", BLUE))
    assert inputs.prompt.endswith("User: one<image_placeholder>two<image_placeholder>\n\nAssistant:")
    assert inputs.picture_sizes == ((60, 40), (30, 90))
    assert inputs.pixels is not None
    assert inputs.pixels.shape == (2, 3, 96, 96)
    assert inputs.pixels[0, 0, 48, 48] == 1
    assert inputs.pixels[1, 2, 48, 48] == 1
    assert inputs.image_mask.tolist() == (inputs.input_ids == process.tokenizer.image_id).tolist()
    changes = inputs.image_mask.int().diff().abs().sum()
    assert int(inputs.image_mask.sum()) == 72
    assert int(changes) == 4


def test_several_turns_with_pictures(process: Processor) -> None:
    messages = [*show(RED, "a"), {"role": "assistant", "content": "b"}, *show("c", BLUE)]
    inputs = process(messages)
    tag = "<image_placeholder>"
    assert inputs.prompt.endswith(f"User: {tag}a\n\nAssistant: b{EOS}User: c{tag}\n\nAssistant:")
    assert int((inputs.input_ids == process.tokenizer.eos_id).sum()) == 1


def test_specials_in_text_are_data(process: Processor) -> None:
    inputs = process(f"say {EOS} and {IMAGE}")
    assert process.tokenizer.eos_id not in inputs.input_ids
    assert not inputs.image_mask.any()
    assert process.tokenizer.image_id not in inputs.input_ids
    system = [{"role": "system", "content": f"{EOS}{IMAGE}"}, {"role": "user", "content": "a"}]
    assert not {process.tokenizer.eos_id, process.tokenizer.image_id} & set(
        process(system).input_ids.tolist()
    )


def test_specials_in_the_official_form_are_control(process: Processor) -> None:
    inputs = process([{"role": "User", "content": f"a{EOS}b"}])
    assert int((inputs.input_ids == process.tokenizer.eos_id).sum()) == 1


def test_a_placeholder_no_picture_belongs_to(process: Processor) -> None:
    conversation = Conversation((Message("user", (Text(f"a{IMAGE}"),), control=True),))
    with pytest.raises(SeekVLError, match="no picture belongs to"):
        process(conversation)


def test_prefix_continues(process: Processor) -> None:
    opened = process([{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}])
    assert opened.prompt.endswith("Assistant: It is")
    assert process.tokenizer.eos_id not in opened.input_ids
    closed = process.encode(
        parse_messages([{"role": "user", "content": "a"}, {"role": "assistant", "content": "It is"}]),
        train=True,
    )
    assert closed.input_ids.tolist() == [*opened.input_ids.tolist(), process.tokenizer.eos_id]


def test_loss_weights_are_on_answers_and_their_ends(process: Processor) -> None:
    messages = [
        *show(RED, "What colour?"),
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": "Sure? Assistant: Red."},
        {"role": "assistant", "content": "数字 yes 😀"},
    ]
    inputs = process.encode(parse_messages(messages), train=True)
    weights = inputs.loss_weights
    assert weights is not None
    assert weights.dtype == torch.float32
    assert set(weights.tolist()) == {0.0, 1.0}
    learnt = inputs.input_ids[weights == 1].tolist()
    text = process.tokenizer.decode(learnt, skip_specials=False)
    assert text == f" Red.{EOS} 数字 yes 😀{EOS}"
    assert not (inputs.image_mask & (weights == 1)).any()


def test_training_sees_the_prompt_that_is_asked_later(process: Processor) -> None:
    """Up to the first learnt token, training tokens are exactly those of the question alone."""
    for answer in ("Red.", "5", "(a)", "...", "图", '"x"'):
        question = show(RED, "What?")
        asked = process(question).input_ids.tolist()
        messages = parse_messages([*question, {"role": "assistant", "content": answer}])
        trained = process.encode(messages, train=True)
        assert trained.loss_weights is not None
        start = int(trained.loss_weights.argmax())
        assert trained.input_ids[:start].tolist() == asked, answer


def test_training_needs_an_answer(process: Processor) -> None:
    with pytest.raises(SeekVLError, match="must end with an assistant message"):
        process.encode(parse_messages("hi"), train=True)


def test_finished_prompts(process: Processor) -> None:
    inputs = process.encode_prompt(f"a <image_placeholder> b{EOS}c", pictures=[RED])
    assert int(inputs.image_mask.sum()) == 36
    assert int((inputs.input_ids == process.tokenizer.eos_id).sum()) == 1
    assert inputs.prompt == f"a <image_placeholder> b{EOS}c"
    with pytest.raises(SeekVLError, match="0 <image_placeholder> but 1 pictures"):
        process.encode_prompt("a", pictures=[RED])
    learnt = process.encode_prompt("a <image_placeholder> b", pictures=[RED], train=True)
    assert learnt.loss_weights is not None
    assert learnt.input_ids[-1] == process.tokenizer.eos_id
    expected = ~learnt.image_mask
    expected[0] = False
    assert torch.equal(learnt.loss_weights == 1, expected)


def test_bill(process: Processor) -> None:
    messages = show(RED, "a", BLUE)
    bill = process.tokens(messages)
    inputs = process(messages)
    assert inputs.bill == bill
    assert bill.image_tokens == (36, 36)
    assert bill.total == len(inputs.input_ids) == bill.text_tokens + 72
    assert bill.limit == 4096
    assert process.picture_tokens == 36


def test_over_the_limit_comes_with_the_bill(tokenizer: Tokenizer) -> None:
    process = Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, max_tokens=200)
    missing = show("missing-a.png", "x")
    missing[0]["content"] = [{"type": "image", "image": "no-such.png"}] * 3
    with pytest.raises(SeekVLError, match=r"\d+ text tokens \+ 108 picture tokens \(3 x 36\).*200"):
        process(missing)
    assert process.tokens(missing).total > 200
    with pytest.raises(SeekVLError, match=r"text tokens\), more than the limit of 200"):
        process("word " * 300)
    exact = process.tokens("hi").total
    assert len(Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, max_tokens=exact)("hi").input_ids) == exact
    with pytest.raises(SeekVLError, match="more than the limit"):
        Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, max_tokens=exact - 1)("hi")


def test_500_pictures(process: Processor) -> None:
    message = {"role": "User", "content": "<image_placeholder>" * 500, "images": [RED] * 500}
    with pytest.raises(SeekVLError, match=r"18,000 picture tokens \(500 x 36\)"):
        process([message])


def test_bad_pictures_are_numbered(process: Processor) -> None:
    with pytest.raises(SeekVLError, match=r"picture 2: .*no such file"):
        process(show(RED, Path("no-such.png")))


def test_modes(tokenizer: Tokenizer) -> None:
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    shown = show(image, "a")
    mine = Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK)(shown)
    official = Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, preprocessing="official")(shown)
    theirs = Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, preprocessing="transformers")(shown)
    assert mine.pixels is not None
    assert official.pixels is not None
    assert (float(mine.pixels.max()), float(official.pixels.max())) == (pytest.approx(127 / 255), 0.0)
    assert (mine.normalized, official.normalized, theirs.normalized) == (False, False, True)
    assert torch.equal(mine.input_ids, theirs.input_ids)


def test_low_pixels_are_stacked(tokenizer: Tokenizer) -> None:
    config = PadImageConfig(image_size=96, patch_slots_side=6, low_size=48)
    inputs = Processor(tokenizer, config, DEEPSEEK, preprocessing="transformers")(show(RED, BLUE, "a"))
    assert inputs.low_pixels is not None
    assert inputs.low_pixels.shape == (2, 3, 48, 48)


def test_bad_processors(tokenizer: Tokenizer) -> None:
    with pytest.raises(SeekVLError, match="unknown preprocessing 'x'"):
        Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, preprocessing="x")  # type: ignore[arg-type]
    with pytest.raises(SeekVLError, match="max_tokens must be a whole number of at least 1"):
        Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK, max_tokens=0)


def test_the_same_twice(process: Processor) -> None:
    conversation = Conversation((Message("user", (Picture(RED), Text("a"))),))
    first, second = process(conversation), process(conversation)
    assert torch.equal(first.input_ids, second.input_ids)
    assert first.pixels is not None
    assert second.pixels is not None
    assert torch.equal(first.pixels, second.pixels)


def test_a_picture_shown_again_is_not_prepared_again(
    process: Processor, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Processor(tokenizer, IMAGE_CONFIG, DEEPSEEK)
    prepared: list[Any] = []
    prepare = encode.prepare_picture

    def noted(image: Image.Image, *given: Any, **more: Any) -> Any:
        prepared.append(image)
        return prepare(image, *given, **more)

    monkeypatch.setattr(encode, "prepare_picture", noted)
    process.remember(10**6)
    first, again = process(show(RED, BLUE, "one")), process(show(BLUE, "two", RED))
    assert prepared == [RED, BLUE]
    expected = plain(show(BLUE, "two", RED))
    assert expected.digests is None
    assert first.digests is not None
    assert again.digests == first.digests[::-1] == tuple(picture_digests(expected))
    assert again.pixels is not None
    assert expected.pixels is not None
    assert torch.equal(again.pixels, expected.pixels)
    assert again.picture_sizes == expected.picture_sizes
    equal = Image.new("RGB", (60, 40), "red")  # another object may have been changed since
    assert process(show(equal)).digests == first.digests[:1]
    assert len(prepared) == 5, "two, two by the other processor, and this one"


def test_a_remembered_picture_depends_on_what_its_tiles_depend_on() -> None:
    tiled = seekvl.load(GOLDEN / "vl2-base-like", device="cpu").processor
    wide = Image.new("RGB", (900, 300), "red")
    asked = [
        Conversation((Message("user", (*(Picture(wide, detail=detail) for _ in range(count)), Text("?"))),))
        for count, detail in ((1, "auto"), (1, "low"), (3, "auto"), (1, "high"))
    ]
    expected = [tiled.encode(one).grids for one in asked]
    bounded = tiled.bounded(1).encode(asked[0]).grids
    assert len({*expected, bounded}) > 2
    tiled.remember(10**9)
    for _ in range(2):
        assert [tiled.encode(one).grids for one in asked] == expected
        assert tiled.bounded(1).encode(asked[0]).grids == bounded
    found = tiled.encode(asked[0])
    tiled._recent = None
    assert found.digests == tuple(picture_digests(tiled.encode(asked[0])))


def test_a_conversation_is_remembered_when_all_its_pictures_are(process: Processor) -> None:
    def asked(*shown: Image.Image) -> Conversation:
        return Conversation((Message("user", (*map(Picture, shown), Text("?"))),))

    assert process.remembers(asked())
    process.encode(asked(RED))
    assert not process.remembers(asked(RED)), "nothing is kept unless it was asked for"
    process.remember(10**6)
    assert not process.remembers(asked(RED))
    process.encode(asked(RED))
    assert process.remembers(asked(RED))
    assert not process.remembers(asked(RED, RED)), "two may be seen otherwise than one"
    assert not process.remembers(asked(BLUE))
    process.remember(10)  # too little for any
    process.encode(asked(RED))
    assert not process.remembers(asked(RED))
