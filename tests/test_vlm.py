"""The object users hold, on the smallest golden checkpoint (random weights: the words mean nothing)."""

import math
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import seekvl
from seekvl import vlm as vlm_module
from seekvl.engine.forward import exact_cuts
from seekvl.engine.kernels.products import MAX_ROWS
from seekvl.engine.request import Completion, SamplingParams, Timings, Usage
from seekvl.engine.runner import Runner
from seekvl.processing import grounding
from seekvl.processing.encode import Processor
from seekvl.processing.template import DEEPSEEK

GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURE = GOLDEN / "images" / "grad_224x160.png"
OTHER = GOLDEN / "images" / "square_384x384.png"


@pytest.fixture(scope="module")
def vlm() -> seekvl.VLM:
    return seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32")


def shown(*pictures: object, text: str = "What is this?") -> list[dict[str, object]]:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_importing_seekvl_loads_nothing_heavy() -> None:
    code = "import sys, seekvl; seekvl.__version__; print('torch' in sys.modules, sorted(dir(seekvl)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, names = run.stdout.strip().split(" ", 1)
    assert loaded == "False"
    assert names == str(sorted(seekvl.__all__))


def test_every_public_name_exists() -> None:
    for name in seekvl.__all__:
        assert getattr(seekvl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        seekvl.nothing  # noqa: B018


def test_what_users_hold(vlm: seekvl.VLM) -> None:
    assert vlm.device == torch.device("cpu")
    assert vlm.dtype == torch.float32
    assert vlm.tokenizer is vlm.processor.tokenizer
    assert vlm.config is vlm.model.config
    inputs = vlm.processor(shown(PICTURE))
    assert inputs.input_ids.dtype == torch.int64
    assert inputs.input_ids.ndim == 1


def test_ask_takes_a_picture_in_every_form(vlm: seekvl.VLM) -> None:
    with Image.open(PICTURE) as image:
        image.load()
    forms = [PICTURE, str(PICTURE), PICTURE.read_bytes(), image, [PICTURE], (image,)]
    answers = [vlm.ask(form, "What is this?", max_new_tokens=6) for form in forms]
    assert len({tuple(answer.token_ids) for answer in answers}) == 1
    assert answers[0].usage.image_tokens == 36
    assert answers[0].token_ids == vlm.chat(shown(PICTURE), max_new_tokens=6).token_ids


def test_ask_without_a_picture_and_with_several(vlm: seekvl.VLM) -> None:
    assert vlm.ask([], "Hello?", max_new_tokens=2).usage.image_tokens == 0
    assert vlm.ask([PICTURE, OTHER], "Which?", max_new_tokens=2).usage.image_tokens == 72


def test_the_answer_is_complete(vlm: seekvl.VLM) -> None:
    vlm.engine.forget()  # the picture was shown before
    answer = vlm.chat(shown(PICTURE), max_new_tokens=6)
    assert answer.text == vlm.tokenizer.decode(answer.token_ids).lstrip()
    assert answer.finish_reason == "length"
    assert answer.usage.completion_tokens == len(answer.token_ids) == 6
    assert answer.usage.prompt_tokens == len(vlm.processor(shown(PICTURE)).input_ids)
    timings = answer.timings
    assert min(timings.preprocess, timings.vision, timings.prefill, timings.decode) > 0


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.2, "seed": 4},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 30, "repetition_penalty": 1.2, "seed": 5},
        {"stop": ("e", "我")},
    ],
)
def test_pieces_joined_equal_the_text(vlm: seekvl.VLM, params: dict[str, Any]) -> None:
    pieces = list(vlm.stream(shown(PICTURE), max_new_tokens=20, **params))
    answer = vlm.chat(shown(PICTURE), max_new_tokens=20, **params)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert [piece.token_id for piece in pieces if piece.token_id is not None] == answer.token_ids
    assert [piece.completion is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_started_answer_is_continued_with_its_space(vlm: seekvl.VLM) -> None:
    messages = [*shown(PICTURE), {"role": "assistant", "content": "It is a"}]
    answer = vlm.chat(messages, max_new_tokens=8)
    assert answer.text == vlm.tokenizer.decode(answer.token_ids)


def test_batch_equals_chat(vlm: seekvl.VLM) -> None:
    conversations: list[Any] = ["Hello, who are you?", shown(PICTURE), shown(PICTURE, OTHER), "Hi"]
    together = vlm.batch(conversations, max_new_tokens=8)
    for conversation, answer in zip(conversations, together, strict=True):
        alone = vlm.chat(conversation, max_new_tokens=8)
        assert (answer.token_ids, answer.text) == (alone.token_ids, alone.text)
    assert vlm.batch([]) == []


def test_a_bad_conversation_stops_a_batch_before_it_starts(vlm: seekvl.VLM) -> None:
    hook = vlm.model.language.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(seekvl.SeekVLError, match=r"conversation 2 of 2: picture 1: .*missing.png"):
        vlm.batch(["Hello", shown("missing.png")])
    with pytest.raises(seekvl.SeekVLError, match="list of conversations"):
        vlm.batch("Hello")
    hook.remove()


def test_cancelling_a_chat(vlm: seekvl.VLM) -> None:
    vlm.engine.forget()
    asked = iter([False] * 6)
    answer = vlm.chat(shown(PICTURE), cancel=lambda: next(asked, True))
    assert answer.finish_reason == "cancelled"
    pieces = 1 if exact_cuts(vlm.model) else 2  # of the prompt, the last of which gives a token
    assert len(answer.token_ids) == 6 - pieces  # beside a picture, and a token a step


def test_a_second_question_about_a_picture_needs_neither_tower_nor_the_shared_prompt(
    vlm: seekvl.VLM,
) -> None:
    vlm.engine.forget()
    first = vlm.ask(PICTURE, "What is this?", max_new_tokens=4)
    second = vlm.ask(PICTURE, "And which colour has it?", max_new_tokens=4)
    assert (first.timings.vision > 0, first.usage.cached_tokens) == (True, 0)
    assert second.timings.vision == 0
    assert second.usage.cached_tokens > second.usage.image_tokens == 36
    vlm.engine.forget()
    assert vlm.ask(PICTURE, "And which colour has it?", max_new_tokens=4).token_ids == second.token_ids


def test_weights_that_change_between_questions_are_noticed() -> None:
    vlm = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="float32")
    before = vlm.chat(shown(PICTURE), max_new_tokens=6)
    with torch.no_grad():
        vlm.model.vision.patch_embed.weight.mul_(-3)
    fresh = seekvl.VLM(vlm.model, vlm.processor).chat(shown(PICTURE), max_new_tokens=6)
    after = vlm.chat(shown(PICTURE), max_new_tokens=6)
    assert after.token_ids == fresh.token_ids != before.token_ids
    assert after.usage.cached_tokens == 0
    vlm.model.to(torch.bfloat16)
    half = vlm.chat(shown(PICTURE), max_new_tokens=2)
    assert (len(half.token_ids), half.usage.cached_tokens) == (2, 0)


def test_threads_share_the_model_and_get_their_own_answers(vlm: seekvl.VLM) -> None:
    questions = ["Hello?", "What is this?", "Why is it red?", "Who are you?"]
    alone = [vlm.ask(PICTURE, question, max_new_tokens=6).token_ids for question in questions]
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = vlm.ask(PICTURE, questions[index], max_new_tokens=6).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(4)] == alone


def test_closing_a_stream_stops_it(vlm: seekvl.VLM) -> None:
    calls: list[int] = []
    stream = vlm.stream(shown(PICTURE), max_new_tokens=50)
    next(stream)
    hook = vlm.model.language.register_forward_hook(lambda *_: calls.append(1))
    stream.close()
    assert list(stream) == []
    assert calls == []
    hook.remove()


def test_score(vlm: seekvl.VLM) -> None:
    messages = shown(PICTURE)
    scores = vlm.score(messages, ["A", "B", " there are two"])
    rows = vlm.logits(messages)[-1].log_softmax(-1)
    for score, text in zip(scores[:2], "AB", strict=True):
        assert score.tokens == 1
        assert score.logprob == pytest.approx(float(rows[vlm.tokenizer.encode(text)[0]]), abs=1e-4)
    assert scores[2].tokens == len(vlm.tokenizer.encode(" there are two")) > 1
    assert scores[2].perplexity == pytest.approx(math.exp(-scores[2].logprob / scores[2].tokens))


def test_score_needs_words(vlm: seekvl.VLM) -> None:
    with pytest.raises(seekvl.SeekVLError, match="continuation 1 of 1 has no tokens"):
        vlm.score("Hello", [""])
    with pytest.raises(seekvl.SeekVLError, match="list of continuations"):
        vlm.score("Hello", "ABCD")


def test_logits(vlm: seekvl.VLM) -> None:
    logits = vlm.logits(shown(PICTURE))
    assert logits.shape == (len(vlm.processor(shown(PICTURE)).input_ids), 700)
    assert logits.dtype == torch.float32
    assert int(logits[-1].argmax()) == vlm.chat(shown(PICTURE), max_new_tokens=1).token_ids[0]


def test_boxes_are_read_from_the_text() -> None:
    completion = Completion(
        token_ids=(1,),
        text="<|ref|>the cup<|/ref|><|det|>[[10, 20, 30, 40]]<|/det|>",
        pictures=1,
        finish_reason="stop",
        usage=Usage(prompt_tokens=1, image_tokens=0, completion_tokens=1, cached_tokens=0),
        timings=Timings(preprocess=0, vision=0, prefill=0, decode=0),
    )
    assert vlm_module.answer_of(completion).boxes == [seekvl.Box("the cup", 10, 20, 30, 40)]
    for pictures, image in ((0, 0), (2, 1), (5, 4)):
        (box,) = vlm_module.answer_of(replace(completion, pictures=pictures)).boxes
        assert box == seekvl.Box("the cup", 10, 20, 30, 40, image)


@pytest.mark.parametrize("end", [0, 7, 25, 36, 48, 60, 62])
def test_boxes_of_an_answer_that_was_begun(end: int) -> None:
    """Those that end in the answer count, the open one with what stands in front; whole ones do not."""
    whole = "<|ref|>the cup<|/ref|><|det|>[[10, 20, 30, 40], [50, 60, 70, 80]]<|/det|>"
    completion = Completion(
        token_ids=(1,),
        text=whole[end:],
        begun=whole[:end],
        pictures=1,
        finish_reason="stop",
        usage=Usage(prompt_tokens=1, image_tokens=0, completion_tokens=1, cached_tokens=0),
        timings=Timings(preprocess=0, vision=0, prefill=0, decode=0),
    )
    boxes = [seekvl.Box("the cup", 10, 20, 30, 40), seekvl.Box("the cup", 50, 60, 70, 80)]
    assert vlm_module.answer_of(completion).boxes == boxes[whole[:end].count("]") :]


@pytest.mark.parametrize("together", [False, True])
def test_a_begun_box_is_finished_and_given(vlm: seekvl.VLM, together: bool) -> None:
    begun = "A cup <|ref|>the cup<|/ref|><|det|>[[10, 20, 30, 40], [123, 45,"
    messages = [*shown(PICTURE), {"role": "assistant", "content": f"{begun} "}]
    params: dict[str, Any] = {"max_new_tokens": 40, "constrain": "boxes"}
    answer = vlm.batch([messages], **params)[0] if together else vlm.chat(messages, **params)
    boxes = grounding.parse_boxes(begun + answer.text, strict=True)
    assert answer.boxes == boxes[1:]
    assert answer.boxes[0].corners[:2] == (123, 45)
    assert answer.boxes[0].label == "the cup"


def test_a_session_equals_the_whole_conversation_each_time(vlm: seekvl.VLM) -> None:
    session, messages = vlm.session(), shown(PICTURE, text="What is this?")
    params = SamplingParams(max_new_tokens=8)
    cached = 0
    for question in ("What is this?", "Are you sure?", "Why?"):
        if cached:
            messages.append({"role": "user", "content": question})
        kept = session.ask(question, images=[] if cached else PICTURE, params=params)
        fresh = vlm.chat(messages, max_new_tokens=8)
        assert kept.token_ids == fresh.token_ids
        assert kept.usage.cached_tokens >= cached
        cached = kept.usage.prompt_tokens
        messages.append({"role": "assistant", "content": kept.text})
    assert len(session.messages) == 6


def test_a_session_survives_a_picture_that_is_deleted(vlm: seekvl.VLM, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE.read_bytes())
    session, params = vlm.session(), SamplingParams(max_new_tokens=4)
    session.ask("What is this?", images=path, params=params)
    path.unlink()
    assert session.ask("And now?", params=params).usage.cached_tokens > 36


def test_a_turn_that_is_not_finished_is_not_kept(vlm: seekvl.VLM) -> None:
    session, params = vlm.session(), SamplingParams(max_new_tokens=6)
    assert session.ask("Hello?", params=params, cancel=lambda: True).finish_reason == "cancelled"
    stream = session.stream("Hello?", params=params)
    next(stream)
    stream.close()
    with pytest.raises(seekvl.SeekVLError, match="missing"):
        session.ask("Hello?", images="missing.png")
    assert session.messages == ()
    assert session.ask("Hello?", params=params).token_ids == vlm.ask([], "Hello?", max_new_tokens=6).token_ids


def test_an_answer_that_was_overtaken_says_so(vlm: seekvl.VLM) -> None:
    session, params = vlm.session(), SamplingParams(max_new_tokens=6)
    first = session.stream("Hello?", params=params)
    next(first)
    second = session.stream("What is this?", images=PICTURE, params=params)
    with pytest.raises(seekvl.SeekVLError, match="asked again or reset"):
        next(first)
    ids = [piece.token_id for piece in second]
    assert ids[:6] == vlm.chat(shown(PICTURE), max_new_tokens=6).token_ids
    assert len(session.messages) == 2
    third = session.stream("And now?", params=params)
    session.reset()
    with pytest.raises(seekvl.SeekVLError, match="asked again or reset"):
        next(third)
    assert session.messages == ()


def test_asking_on_at_the_last_piece_is_in_time(vlm: seekvl.VLM) -> None:
    session, params = vlm.session(), SamplingParams(max_new_tokens=4)
    answers = []
    for piece in session.stream("Hello?", params=params):
        if piece.completion is not None:
            answers.append(session.ask("And now?", params=params))
    assert len(session.messages) == 4
    assert len(answers[0].token_ids) == 4


def test_reset_and_system_prompt(vlm: seekvl.VLM) -> None:
    session, params = vlm.session(system="Be brief."), SamplingParams(max_new_tokens=6)
    first = session.ask("Hello?", params=params)
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
    assert first.token_ids == vlm.chat(system, max_new_tokens=6).token_ids
    session.reset()
    again = session.ask("Hello?", params=params)
    assert (again.token_ids, again.usage.cached_tokens) == (first.token_ids, 0)


def test_a_prefill_in_chunks_changes_nothing(vlm: seekvl.VLM) -> None:
    chunked = seekvl.VLM(vlm.model, vlm.processor, prefill_chunk=16)
    for messages in ("Hello", shown(PICTURE, OTHER)):
        assert (
            chunked.chat(messages, max_new_tokens=6).token_ids
            == vlm.chat(messages, max_new_tokens=6).token_ids
        )
        torch.testing.assert_close(
            [score.logprob for score in chunked.score(messages, ["A"])],
            [score.logprob for score in vlm.score(messages, ["A"])],
            atol=1e-4,
            rtol=0,
        )


def test_parts_of_two_checkpoints_do_not_fit(vlm: seekvl.VLM) -> None:
    image = replace(vlm.processor.image, patch_slots_side=5)
    with pytest.raises(seekvl.SeekVLError, match="25 slots a picture, the model 36"):
        seekvl.VLM(vlm.model, Processor(vlm.tokenizer, image, DEEPSEEK))
    with pytest.raises(seekvl.SeekVLError, match="prefill_chunk"):
        seekvl.VLM(vlm.model, vlm.processor, prefill_chunk=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda vlm: vlm.chat("Hello", max_new_tokens=0), "max_new_tokens"),
        (lambda vlm: vlm.stream("Hello", temperature=-1), "temperature"),
        (lambda vlm: vlm.batch(["Hello"], top_p=2.0), "top_p"),
        (lambda vlm: vlm.ask([], "Hello", top_k=0), "top_k"),
        (lambda vlm: vlm.ask([], 3), "must be a string, not int"),
        (lambda vlm: vlm.ask(None, "Hello"), "pictures"),
        (lambda vlm: vlm.ask([], " "), "empty"),
        (lambda vlm: vlm.ask("no-such-file.png", "Hello"), "no-such-file.png"),
        (lambda vlm: vlm.stream([]), "empty"),
        (lambda vlm: vlm.stream("word " * 5000), "limit of 4,096"),
    ],
)
def test_bad_input_is_one_line_and_raised_at_once(
    vlm: seekvl.VLM, call: Callable[[seekvl.VLM], object], message: str
) -> None:
    with pytest.raises(seekvl.SeekVLError, match=message) as caught:
        call(vlm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_nano_answers_in_whole_steps(kind: str) -> None:
    told: list[tuple[int, int]] = []
    vlm = seekvl.load(device="cpu", quantize=kind, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    if vlm.kernels is not None:
        assert Runner(vlm.model, exact=True).spare(rows=1) == MAX_ROWS - 1, "one call takes eight rows"
    asked = {"chart": "Which bar is tallest?", "sign": "What does the sign say?"}
    conversations = [shown(EXAMPLES / f"{name}.png", text=question) for name, question in asked.items()]
    together = vlm.batch(conversations)
    assert [vlm.chat(one).token_ids for one in conversations] == [answer.token_ids for answer in together]
    plain = seekvl.load(device="cpu").batch(conversations)
    assert [answer.text for answer in together] == [answer.text for answer in plain]


def test_load_says_what_it_cannot() -> None:
    with pytest.raises(seekvl.SeekVLError, match="quantize='int2' is unknown; use int8 or int4"):
        seekvl.load(GOLDEN / "vl1-siglip", quantize="int2")
    with pytest.raises(seekvl.SeekVLError, match="folder"):
        seekvl.load("./no/such/folder")


def test_load_takes_a_longer_or_shorter_limit() -> None:
    vlm = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", max_tokens=50)
    with pytest.raises(seekvl.SeekVLError, match="limit of 50"):
        vlm.chat("Hello")


def test_half_precision_answers(vlm: seekvl.VLM) -> None:
    half = seekvl.load(GOLDEN / "vl1-siglip", device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    conversations = ["Hello", shown(PICTURE), shown(PICTURE, OTHER)]
    assert [len(answer.token_ids) for answer in half.batch(conversations, max_new_tokens=4)] == [4, 4, 4]
    close = half.logits(shown(PICTURE)) - vlm.logits(shown(PICTURE))
    assert close.abs().mean() < 0.05


@pytest.fixture(scope="module")
def tiled() -> seekvl.VLM:
    return seekvl.load(GOLDEN / "vl2-base-like", device="cpu", dtype="float32")


def test_a_tiled_family_answers_alike_in_every_way(tiled: seekvl.VLM) -> None:
    conversations = [shown(PICTURE), "Hello", shown(PICTURE, OTHER)]
    alone = [tiled.chat(messages, max_new_tokens=5) for messages in conversations]
    together = tiled.batch(conversations, max_new_tokens=5)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert "".join(piece.text for piece in tiled.stream(conversations[0], max_new_tokens=5)) == alone[0].text
    logits = tiled.logits(conversations[2])
    assert int(logits[-1].argmax()) == alone[2].token_ids[0]
    first, second = alone[2].token_ids[:2]
    words = tiled.tokenizer.decode([first, second])
    (score,) = tiled.score(conversations[2], [words])
    if tiled.tokenizer.encode(words) == [first, second]:
        assert score.logprob <= float(logits[-1].log_softmax(-1)[first])
    session = tiled.session()
    asked = session.ask("What is this?", images=[PICTURE], params=SamplingParams(max_new_tokens=5))
    assert asked.token_ids == alone[0].token_ids


def test_boxes_lie_in_the_last_picture(tiled: seekvl.VLM) -> None:
    """The reference draws on the last picture of the conversation, in-context grounding included."""
    params = SamplingParams(max_new_tokens=40, constrain="box_first")
    text = grounding.in_context(wanted="the same thing")
    conversations: list[Any] = ["Where?", shown(PICTURE), shown(PICTURE, OTHER, text=text)]
    answers = tiled.batch(conversations, max_new_tokens=40, constrain="box_first")
    assert all(answer.boxes for answer in answers)
    assert [{box.image for box in answer.boxes} for answer in answers] == [{0}, {0}, {1}]
    session = tiled.session()
    turns = [session.ask("Where?", images=images, params=params) for images in (PICTURE, OTHER, ())]
    assert all(answer.boxes for answer in turns)
    assert [{box.image for box in answer.boxes} for answer in turns] == [{0}, {1}, {1}]


def test_max_tiles_bounds_what_a_picture_costs() -> None:
    wide = GOLDEN / "images" / "wide_1024x300.png"
    tokens = {}
    for most in (None, 4, 1):
        vlm = seekvl.load(GOLDEN / "vl2-base-like", device="cpu", dtype="float32", max_tiles=most)
        tokens[most] = vlm.ask(wide, "What is it?", max_new_tokens=1).usage.image_tokens
    assert tokens[None] > tokens[4] > tokens[1]
    with pytest.raises(seekvl.SeekVLError, match="max_tiles"):
        seekvl.load(GOLDEN / "vl2-base-like", device="cpu", max_tiles=0)
    with pytest.raises(seekvl.SeekVLError, match="max_tiles"):
        seekvl.load(GOLDEN / "vl1-siglip", device="cpu", max_tiles=4)


def test_parts_of_two_families_do_not_fit(vlm: seekvl.VLM, tiled: seekvl.VLM) -> None:
    with pytest.raises(seekvl.SeekVLError, match="prepares pictures by PadImageConfig"):
        seekvl.VLM(tiled.model, vlm.processor)
    with pytest.raises(seekvl.SeekVLError, match="prepares pictures by TileImageConfig"):
        seekvl.VLM(vlm.model, tiled.processor)
    image = replace(tiled.processor.image, downsample=3)
    other = Processor(tiled.tokenizer, image, tiled.processor.template)
    with pytest.raises(seekvl.SeekVLError, match=r"slots a picture of 1 x 1 tiles, the model 25"):
        seekvl.VLM(tiled.model, other)


@pytest.mark.parametrize("name", ["seekvl-nano", "seekvl-nano-moe"])
def test_neither_loading_nor_answering_imports_the_compiler(name: str) -> None:
    """It takes more than a second, which would be the larger part of a first answer."""
    program = (
        f"import sys, seekvl; vlm = seekvl.load({name!r}, dtype='bfloat16')\n"
        "vlm.ask([], 'Hello', max_new_tokens=2)\n"
        "assert 'torch._dynamo' not in sys.modules and 'sympy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
