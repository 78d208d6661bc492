"""Whatever a user may hand over by mistake ends in one line that names it, before anything is half done."""

import base64
import io
import json
import math
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import seekvl
from seekvl.cli.main import app
from seekvl.engine.request import SamplingParams

GOLDEN = Path(__file__).parent / "golden"
MODEL = GOLDEN / "vl1-siglip"
PICTURE = GOLDEN / "images" / "grad_224x160.png"
EOS = "<｜end▁of▁sentence｜>"
BOS = "<｜begin▁of▁sentence｜>"


@pytest.fixture(scope="module")
def vlm() -> seekvl.VLM:
    return seekvl.load(MODEL, device="cpu", dtype="float32")


@dataclass(frozen=True)
class Case:
    """A mistake and the words that must be in the answer to it."""

    name: str
    make: Callable[..., object]
    says: str


def user(content: object, **more: object) -> list[dict[str, object]]:
    """One message of a user."""
    return [{"role": "user", "content": content, **more}]


def shown(part: Mapping[str, object]) -> list[dict[str, object]]:
    """A message with one part and a question."""
    return user([part, {"type": "text", "text": "What?"}])


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def data_url(text: str) -> list[dict[str, object]]:
    """A message with a picture as data: URL."""
    return shown({"type": "image_url", "image_url": {"url": text}})


TWO_USERS = [*user("a"), *user("b")]
TWO_ANSWERS = [*user("a"), {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}]
PLACEHOLDERS = [{"role": "User", "content": "<image_placeholder>" * 500, "images": [str(PICTURE)]}]
HALF = base64.b64encode(PICTURE.read_bytes()[:400]).decode()

CONVERSATIONS = [
    Case("empty list", lambda: [], "empty"),
    Case("not a list", lambda: 5, "not int"),
    Case("none", lambda: None, "not NoneType"),
    Case("a single message", lambda: user("hi")[0], "must be a list"),
    Case("bytes", lambda: b"hi", "not bytes"),
    Case("a message that is a string", lambda: ["hi"], "message 1 is str"),
    Case("empty text", lambda: "", "turn 1 (user) is empty"),
    Case("blank text", lambda: user("  \n"), "turn 1 (user) is empty"),
    Case("no parts", lambda: user([]), "turn 1 (user) is empty"),
    Case("content None", lambda: user(None), "no content (None)"),
    Case("content a number", lambda: user(5), "content of int"),
    Case("no role", lambda: [{"content": "hi"}], "unknown role None"),
    Case("unknown role", lambda: [{"role": "tool", "content": "hi"}], "unknown role 'tool'"),
    Case("unknown key", lambda: user("hi", name="me"), "unknown key 'name'"),
    Case("assistant first", lambda: [{"role": "assistant", "content": "hi"}], "starts with the assistant"),
    Case("two users in a row", lambda: TWO_USERS, "two user messages in a row"),
    Case("two answers in a row", lambda: TWO_ANSWERS, "two assistant messages in a row"),
    Case("late system", lambda: [*user("a"), {"role": "system", "content": "b"}], "system message"),
    Case("only a system", lambda: [{"role": "system", "content": "b"}], "empty"),
    Case("unknown part", lambda: shown({"type": "video", "video": "a"}), "unknown type 'video'"),
    Case("part without type", lambda: shown({"image": str(PICTURE)}), "unknown type None"),
    Case("part is a number", lambda: user([5]), "part 1 is int"),
    Case("text without text", lambda: user([{"type": "text"}]), "without a string under 'text'"),
    Case("image without source", lambda: shown({"type": "image"}), "needs exactly one of"),
    Case("image_url without url", lambda: shown({"type": "image_url", "image_url": {}}), "not NoneType"),
    Case("image_url absent", lambda: shown({"type": "image_url"}), "needs exactly one of image_url"),
    Case("array as picture", lambda: shown({"type": "image", "image": np.zeros((4, 4, 3))}), "fromarray"),
    Case("images not a list", lambda: user("hi", images=str(PICTURE)), "it must be a list"),
    Case("500 placeholders, 1 picture", lambda: PLACEHOLDERS, "500 <image_placeholder> in its text but 1"),
    Case("500 pictures", lambda: user("hi", images=[str(PICTURE)] * 500), "(500 x 36)"),
    Case("long text", lambda: "word " * 20000, "more than the limit of 4,096"),
    Case("data URL without comma", lambda: data_url("data:image/png;base64"), "needs a comma"),
    Case("data URL that is no base64", lambda: data_url("data:image/png;base64,%%%"), "base64"),
    Case("data URL with half a picture", lambda: data_url(f"data:image/png;base64,{HALF}"), "truncated"),
    Case("data URL with a lone surrogate", lambda: data_url("data:image/png;base64,\ud800"), "base64"),
    Case(
        "path with a lone surrogate", lambda: user("hi", images=["\ud800.png"]), r"\ud800.png: no file name"
    ),
    Case("path of two lines", lambda: user("hi", images=["a\nb.png"]), r"a\nb.png: there is no such file"),
    Case("text with a lone surrogate", lambda: "a \ud800", r"the lone surrogate '\ud800'"),
    Case("ftp", lambda: data_url("ftp://example.org/a.png"), "not supported"),
    Case("file URL", lambda: data_url("file:///etc/passwd"), "not supported"),
]


@pytest.mark.parametrize("case", CONVERSATIONS, ids=lambda case: case.name)
def test_conversations(vlm: seekvl.VLM, case: Case) -> None:
    one_line(case.says, vlm.chat, case.make())


def zero_bytes(folder: Path) -> Path:
    (folder / "zero.png").touch()
    return folder / "zero.png"


def text_file(folder: Path) -> Path:
    (folder / "text.png").write_text("I am no picture", encoding="utf-8")
    return folder / "text.png"


def truncated(folder: Path) -> Path:
    (folder / "half.png").write_bytes(PICTURE.read_bytes()[:-2000])
    return folder / "half.png"


def garbled(folder: Path) -> Path:
    data = bytearray(PICTURE.read_bytes())
    data[60:600] = bytes(540)
    (folder / "garbled.png").write_bytes(data)
    return folder / "garbled.png"


def closed(folder: Path) -> Image.Image:
    with Image.open(PICTURE) as image:
        return image


def unshowable(folder: Path) -> Image.Image:
    image = Image.new("RGB", (4, 4))
    image.info["transparency"] = "none"
    return image


PICTURES = [
    Case("missing file", lambda folder: folder / "nowhere.png", "nowhere.png: there is no such file"),
    Case("missing file as string", lambda folder: "nowhere.png", "nowhere.png: there is no such file"),
    Case("folder", lambda folder: folder, "this is a folder"),
    Case("zero bytes on disk", zero_bytes, "zero.png: not a picture"),
    Case("zero bytes in memory", lambda folder: b"", "empty, no bytes"),
    Case("text file", text_file, "text.png: not a picture"),
    Case("truncated", truncated, "half.png: truncated or damaged"),
    Case("garbled", garbled, "garbled.png: "),
    Case("zero-sized", lambda folder: Image.new("RGB", (0, 5)), "zero-sized, 0x5 px"),
    Case("bomb", lambda folder: png(60000, 60000), "decompression bomb"),
    Case("smaller bomb", lambda folder: png(12000, 12000), "decompression bomb"),
    Case("zero byte in the path", lambda folder: "a\0.png", "zero byte"),
    Case("number", lambda folder: [5], "not int"),
    Case("closed", closed, "its file was closed before"),
    Case("a mode that cannot be shown", unshowable, "cannot be converted to RGB"),
    Case("NaN grey", lambda folder: Image.fromarray(np.full((4, 4), np.nan, np.float32)), "nan"),
    Case("second of two", lambda folder: [PICTURE, folder / "no.png"], "picture 2: picture "),
]


@pytest.mark.parametrize("case", PICTURES, ids=lambda case: case.name)
def test_pictures(vlm: seekvl.VLM, tmp_path: Path, case: Case) -> None:
    one_line(case.says, vlm.ask, case.make(tmp_path), "What?")


PARAMETERS = [
    Case("negative temperature", lambda: {"temperature": -1.0}, "temperature -1.0 is negative"),
    Case("temperature NaN", lambda: {"temperature": math.nan}, "temperature must be a finite number"),
    Case("temperature text", lambda: {"temperature": "hot"}, "temperature must be"),
    Case("top_p 0", lambda: {"top_p": 0.0}, "top_p 0.0"),
    Case("top_p above 1", lambda: {"top_p": 1.5}, "top_p 1.5"),
    Case("top_k 0", lambda: {"top_k": 0}, "top_k must be a whole number of at least 1"),
    Case("max_new_tokens 0", lambda: {"max_new_tokens": 0}, "max_new_tokens must be"),
    Case("max_new_tokens fraction", lambda: {"max_new_tokens": 2.5}, "not 2.5"),
    Case("repetition_penalty 0", lambda: {"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
    Case("seed text", lambda: {"seed": "lucky"}, "seed must be a whole number, not 'lucky'"),
    Case("empty stop", lambda: {"stop": ""}, "stop holds ''"),
    Case("stop a number", lambda: {"stop": 5}, "stop is int"),
]


@pytest.mark.parametrize("case", PARAMETERS, ids=lambda case: case.name)
def test_parameters(vlm: seekvl.VLM, case: Case) -> None:
    wrong = case.make()
    assert isinstance(wrong, dict)
    one_line(case.says, vlm.chat, "hi", **wrong)
    one_line(case.says, SamplingParams, **wrong)


def copy(folder: Path) -> Path:
    """A copy of the checkpoint to break."""
    target = folder / "model"
    shutil.copytree(MODEL, target, ignore=shutil.ignore_patterns("cases.*"))
    return target


def edit_config(change: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], Path]:
    """What copies the checkpoint and changes its config.json."""

    def make(folder: Path) -> Path:
        path = copy(folder) / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        change(config)
        path.write_text(json.dumps(config), encoding="utf-8")
        return path.parent

    return make


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], Path]:
    """What copies the checkpoint and changes its tensors."""

    def make(folder: Path) -> Path:
        path = copy(folder) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        return path.parent

    return make


def edit_file(name: str, change: Callable[[bytes], bytes | None]) -> Callable[[Path], Path]:
    """What copies the checkpoint and changes the bytes of a file, or removes it."""

    def make(folder: Path) -> Path:
        path = copy(folder) / name
        data = change(path.read_bytes())
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        return path.parent

    return make


HEAD, NORM = "language_model.lm_head.weight", "language_model.model.norm.weight"
WEIGHTS = "model.safetensors"

CHECKPOINTS = [
    Case("no such folder", lambda folder: folder / "nowhere", "there is no folder"),
    Case("a file", lambda folder: PICTURE, "is a file"),
    Case("empty folder", lambda folder: folder, "config.json"),
    Case("no name", lambda folder: "no such name", "there is no folder 'no such name'"),
    Case("a number", lambda folder: 5, "not 5"),
    Case("nothing", lambda folder: "", "not ''"),
    Case("too long a name", lambda folder: "x" * 5000, "there is no folder 'xxx"),
    Case("config missing", edit_file("config.json", lambda data: None), "config.json"),
    Case("config cut", edit_file("config.json", lambda data: data[:100]), "config.json"),
    Case("config a list", edit_file("config.json", lambda data: b"[]"), "config.json"),
    Case("config not UTF-8", edit_file("config.json", lambda data: b"\xff\xfe\xff"), "config.json"),
    Case("other family", edit_config(lambda c: c.update(model_type="llava")), "llava"),  # type: ignore[call-overload]
    Case("no language model", edit_config(lambda c: c.pop("language_config")), "language_config"),
    Case(
        "width that fits no heads", edit_config(lambda c: c["language_config"].update(hidden_size=81)), "81"
    ),
    Case("no heads", edit_config(lambda c: c["vision_config"]["params"].update(heads=0)), "heads 0 must be"),  # type: ignore[attr-defined]
    Case(
        "no key-value heads",
        edit_config(lambda c: c["language_config"].update(num_key_value_heads=0)),
        "kv_heads 0 must be",
    ),
    Case(
        "negative width",
        edit_config(lambda c: c["vision_config"]["params"].update(mlp_ratio=-1)),  # type: ignore[attr-defined]
        "mlp_width -",
    ),
    Case(
        "NaN in the config",
        edit_config(lambda c: c["language_config"].update(rms_norm_eps=math.nan)),
        "rms_norm_eps is NaN, expected a finite number",
    ),
    Case("unknown tower", edit_config(lambda c: c["vision_config"].update(cls="Eye")), "Eye"),
    Case("unknown key", edit_config(lambda c: c["language_config"].update(rope_magic=3)), "rope_magic"),
    Case("fewer layers", edit_config(lambda c: c["language_config"].update(num_hidden_layers=2)), "layers.2"),
    Case("weights missing", edit_file(WEIGHTS, lambda data: None), "has no weights"),
    Case("weights empty", edit_file(WEIGHTS, lambda data: b""), "model.safetensors"),
    Case("weights cut", edit_file(WEIGHTS, lambda data: data[:-5000]), "download it again"),
    Case("weights cut in the header", edit_file(WEIGHTS, lambda data: data[:500]), "download it again"),
    Case("weights longer", edit_file(WEIGHTS, lambda data: data + b"more"), "instead of"),
    Case("header garbled", edit_file(WEIGHTS, lambda data: data[:9] + b"#" + data[10:]), "garbled header"),
    Case("header huge", edit_file(WEIGHTS, lambda data: b"\xff" * 8 + data[8:]), "model.safetensors"),
    Case("tensor missing", edit_weights(lambda tensors: tensors.pop(NORM)), "norm.weight"),
    Case(
        "tensor left over", edit_weights(lambda t: t.update({"extra.weight": torch.zeros(2)})), "extra.weight"
    ),
    Case("tensor of other shape", edit_weights(lambda t: t.update({NORM: torch.ones(79)})), "79"),
    Case("tensor of integers", edit_weights(lambda t: t.update({NORM: torch.ones(80).long()})), "I64"),
    Case(
        "NaN", edit_weights(lambda t: t[HEAD].index_fill_(0, torch.tensor([3]), math.nan)), "NaN or infinite"
    ),
    Case("infinity", edit_weights(lambda t: t[NORM].fill_(math.inf)), f"tensor {NORM}"),
    Case("tokenizer missing", edit_file("tokenizer.json", lambda data: None), "tokenizer.json"),
    Case("tokenizer cut", edit_file("tokenizer.json", lambda data: data[:1000]), "tokenizer.json"),
    Case("tokenizer of another model", edit_file("tokenizer.json", lambda data: b"{}"), "tokenizer.json"),
    Case(
        "pixels config cut",
        edit_file("preprocessor_config.json", lambda data: data[:20]),
        "preprocessor_config",
    ),
]


@pytest.mark.parametrize("case", CHECKPOINTS, ids=lambda case: case.name)
def test_checkpoints(tmp_path: Path, case: Case) -> None:
    one_line(case.says, seekvl.load, case.make(tmp_path), device="cpu")


LOADING = [
    Case("no device", lambda: {"device": None}, "device None"),
    Case("device without numbers", lambda: {"device": "meta"}, "device 'meta'"),
    Case("dtype a list", lambda: {"dtype": ["float32"]}, "dtype ['float32']"),
    Case("max_tokens text", lambda: {"max_tokens": "5"}, "max_tokens '5'"),
    Case("max_tokens a fraction", lambda: {"max_tokens": 2.5}, "max_tokens 2.5"),
    Case("device", lambda: {"device": "abacus"}, "device 'abacus'"),
    Case("device number", lambda: {"device": "cuda:99"}, "cuda:99"),
    Case("dtype", lambda: {"dtype": "int3"}, "dtype 'int3'"),
    Case("torch dtype", lambda: {"dtype": torch.int8}, "torch.int8"),
    Case("preprocessing", lambda: {"preprocessing": "best"}, "unknown preprocessing 'best'"),
    Case("quantize", lambda: {"quantize": "int3"}, "quantize='int3'"),
    Case(
        "quantized on a GPU",
        lambda: {"quantize": "int4", "device": "cuda:99"},
        "cuda:99",
    ),
    Case("revision of a folder", lambda: {"revision": "main"}, "revision 'main'"),
    Case("max_tokens 0", lambda: {"max_tokens": 0}, "max_tokens 0"),
    Case("max_tokens above the positions", lambda: {"max_tokens": 10**6}, "16384"),
]


@pytest.mark.parametrize("case", LOADING, ids=lambda case: case.name)
def test_loading(case: Case) -> None:
    wrong = case.make()
    assert isinstance(wrong, dict)
    one_line(case.says, seekvl.load, MODEL, **({"device": "cpu"} | wrong))


CALLS = [
    Case("ask without a question", lambda vlm: vlm.ask(PICTURE, None), "question must be a string"),
    Case("ask with an empty question and no picture", lambda vlm: vlm.ask([], ""), "empty"),
    Case("batch of one conversation", lambda vlm: vlm.batch("hi"), "list of conversations"),
    Case("batch of nothing", lambda vlm: vlm.batch(None), "list of conversations, not NoneType"),
    Case("score of no list", lambda vlm: vlm.score("hi", None), "list of continuations, not NoneType"),
    Case("score of a number", lambda vlm: vlm.score("hi", ["A", 5]), "continuation 2 of 2 must be a string"),
    Case("batch with a bad one", lambda vlm: vlm.batch(["a", [], "b"]), "conversation 2 of 3: "),
    Case("score of a string", lambda vlm: vlm.score("hi", "A"), "list of continuations"),
    Case("score of nothing to say", lambda vlm: vlm.score("hi", ["A", ""]), "continuation 2 of 2"),
    Case("logits of nothing", lambda vlm: vlm.logits([]), "empty"),
    Case("stream of nothing", lambda vlm: vlm.stream([]), "empty"),
    Case("session with a bad picture", lambda vlm: vlm.session().ask("What?", images="no.png"), "no.png"),
]


@pytest.mark.parametrize("case", CALLS, ids=lambda case: case.name)
def test_calls(vlm: seekvl.VLM, case: Case) -> None:
    one_line(case.says, case.make, vlm)


def test_a_batch_with_a_bad_conversation_computes_nothing(vlm: seekvl.VLM) -> None:
    passes = []
    hook = vlm.model.language.register_forward_pre_hook(lambda *_: passes.append(1))
    layer = vlm.model.language.layers[0].register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        one_line("conversation 3 of 3", vlm.batch, ["a", "b", user("c", images=["nowhere.png"])])
        assert passes == []
        vlm.chat("a", max_new_tokens=1)
        assert passes != []
    finally:
        hook.remove()
        layer.remove()


@pytest.mark.parametrize("size", [(1, 1), (20000, 3), (3, 20000), (1, 5000)])
def test_absurd_sizes_work(vlm: seekvl.VLM, size: tuple[int, int]) -> None:
    answer = vlm.ask(Image.new("RGB", size, "red"), "What?", max_new_tokens=2)
    assert answer.usage.image_tokens == vlm.config.visual_tokens


@pytest.mark.parametrize("text", [EOS, BOS, "<image_placeholder>", f"a{EOS}{EOS}b", f"<｜▁pad▁｜>{BOS}"])
@pytest.mark.parametrize("place", ["user", "system", "assistant", "part"])
def test_specials_in_text_are_data(vlm: seekvl.VLM, text: str, place: str) -> None:
    def messages(words: str) -> list[dict[str, object]]:
        system: dict[str, object] = {"role": "system", "content": words if place == "system" else "s"}
        asked = user(words if place == "user" else "u")
        if place == "part":
            asked = user([{"type": "text", "text": words}])
        said: dict[str, object] = {"role": "assistant", "content": words if place == "assistant" else "a"}
        return [system, *asked, said, *user("And?")]

    tokenizer = vlm.tokenizer
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.image_id}
    count = [
        sum(token in control for token in vlm.processor(messages(words)).input_ids.tolist())
        for words in ("plain", text)
    ]
    assert count[0] == count[1]
    inputs = vlm.processor(messages(text))
    assert text in inputs.prompt
    assert not inputs.image_mask.any()


def test_a_failed_call_leaves_the_model_as_it_was(vlm: seekvl.VLM) -> None:
    before = vlm.ask(PICTURE, "What?", max_new_tokens=8).token_ids
    for case in (*CONVERSATIONS[:12], *CONVERSATIONS[-8:]):
        one_line(case.says, vlm.chat, case.make())
    assert vlm.ask(PICTURE, "What?", max_new_tokens=8).token_ids == before


def test_png_of_this_file_is_read_when_it_is_whole(vlm: seekvl.VLM) -> None:
    """The bombs above are refused for their size, not because their maker writes broken files."""
    buffer = io.BytesIO()
    Image.new("1", (40, 40)).save(buffer, format="PNG")
    assert vlm.ask(buffer.getvalue(), "What?", max_new_tokens=1).usage.image_tokens == 36
    one_line("40x40 px cannot be decoded", vlm.ask, png(40, 40), "What?")


COMMANDS = [
    Case("missing picture", lambda folder: ["ask", "nowhere.png", "What?"], "nowhere.png"),
    Case("truncated picture", lambda folder: ["ask", str(truncated(folder)), "What?"], "half.png"),
    Case("folder as picture", lambda folder: ["ask", str(folder), "What?"], "this is a folder"),
    Case("bad temperature", lambda folder: ["ask", "What?", "--temperature", "inf"], "temperature"),
    Case("long question", lambda folder: ["ask", "word " * 9000], "more than the limit of 4,096"),
    Case("unknown device", lambda folder: ["chat", "--device", "abacus"], "abacus"),
]


@pytest.mark.parametrize("case", COMMANDS, ids=lambda case: case.name)
def test_commands(tmp_path: Path, case: Case) -> None:
    arguments = case.make(tmp_path)
    assert isinstance(arguments, list)
    result = CliRunner().invoke(app, [*arguments, "--model", str(MODEL)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert case.says in result.stderr
    assert result.stderr.count("\n") == 1


def one_line(says: str, call: Callable[..., object], *arguments: object, **options: object) -> None:
    """Check that a call fails with one line that holds these words."""
    with pytest.raises(seekvl.SeekVLError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert len(message) < 600
