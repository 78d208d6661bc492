import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seekvl.evals import speed
from seekvl.evals.gguf import write_gguf
from seekvl.evals.speed import Settings, bench
from seekvl.models.llama import Llama
from seekvl.models.quantized import Kind
from seekvl.runtime import SeekVLError
from seekvl.weights.load import BUNDLED, load_checkpoint
from seekvl.weights.save_quantized import save_quantized

SMALL = Path(__file__).parents[1] / "golden" / "vl1-siglip"
SINGLE: dict[str, Any] = {"threads": 1, "tokens": 3, "rounds": 1, "quiet": 0.0}
QUICK = SINGLE | {"batches": (2,)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of small matrices: they are not what is tested here."""
    whole = speed.measure_ceilings
    monkeypatch.setattr(
        speed, "measure_ceilings", lambda **chosen: whole(**chosen, memory=1 << 20, side=64, turns=1)
    )


@pytest.mark.usefixtures("small")
def test_a_folder_beside_transformers() -> None:
    pytest.importorskip("transformers")
    said: list[str] = []
    report = bench(str(SMALL), Settings(**QUICK, peer="transformers"), say=said.append)
    assert (report.weights, report.dtype, report.peer) == ("folder", "float32", "transformers")
    names = ["load", "first token", "vision", "prefill", "decode, batch 1", "decode, batch 2"]
    names += ["memory, batch 1", "memory, batch 2"]
    assert [figure.name for figure in report.figures] == names
    for figure in report.figures:
        assert figure.ours > 0, figure.name
        assert figure.peer is not None, figure.name
        assert figure.peer > 0, figure.name
        if figure.work is not None:
            floor, bound = report.ceilings.seconds(
                read_bytes=figure.work.read_bytes, operations=figure.work.operations, dtype="float32"
            )
            assert figure.share == pytest.approx(floor / figure.seconds), figure.name
            assert figure.bound == bound
    by_name = {figure.name: figure for figure in report.figures}
    assert by_name["decode, batch 2"].seconds == pytest.approx(2 / by_name["decode, batch 2"].ours)
    assert json.loads(report.json())["tokens"]["answer"] == 3
    order = [line for line in said if line.startswith(("comparing", "round"))]
    assert said[0] == "writing the weights in the layout of transformers"
    assert order == [
        "comparing answers with those of transformers",
        "round 1 of 1: seekvl",
        "round 1 of 1: transformers",
    ]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("model", "quantize"), [(str(SMALL), None), ("seekvl-nano", "int8"), ("seekvl-nano", "int4")]
)
def test_words_beside_llama_cpp(model: str, quantize: str | None) -> None:
    pytest.importorskip("llama_cpp", reason="the extra llama is not installed")
    said: list[str] = []
    settings = Settings(**SINGLE, dtype="bfloat16", quantize=quantize, peer="llama.cpp")
    report = bench(model, settings, say=said.append)
    names = ["load", "first token", "prefill", "decode, batch 1", "memory, batch 1"]
    assert [figure.name for figure in report.figures] == names
    assert all(figure.ours > 0 and figure.peer is not None and figure.peer > 0 for figure in report.figures)
    assert report.image_tokens == 0
    assert report.prompt_tokens > 54 + 16
    assert "llama.cpp runs the text part only" in report.table()
    load = json.loads(report.json())["figures"]["load"]
    assert load.keys() == {"ours", "unit", "peer", "ratio", "peer_name"}
    assert load["peer_name"] == "llama.cpp"
    order = [line for line in said if line.startswith(("comparing", "round", "writing the language"))]
    assert order[:2] == [
        "writing the language model for llama.cpp, as F16",
        "comparing answers with those of llama.cpp",
    ]
    packed = {"int8": ["Q8_0"], "int4": ["Q4_0"]}.get(quantize or "", [])
    assert order[2:] == [
        *(f"writing the language model for llama.cpp, as {name}" for name in packed),
        "round 1 of 1: seekvl",
        "round 1 of 1: llama.cpp",
    ]


@pytest.mark.usefixtures("small")
def test_a_llama_cpp_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp", reason="the extra llama is not installed")

    def wrong(network: Llama, path: Path, *, kind: Kind | None = None) -> None:
        with torch.no_grad():
            network.layers[0].attn.q_proj.weight.mul_(-1.0)  # type: ignore[union-attr, operator]  # a layer
        write_gguf(network, path, kind=kind)

    monkeypatch.setattr(speed, "write_gguf", wrong)
    with pytest.raises(SeekVLError, match=r"seekvl and llama\.cpp do not compute the same, so they are not"):
        bench(str(SMALL), Settings(**SINGLE, peer="llama.cpp"), say=print)


def test_llama_cpp_wants_its_packages_and_plain_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = load_checkpoint(SMALL, device="cpu", dtype="float32")
    tokenizer = source.folder / "tokenizer.json"
    save_quantized(source.model, tmp_path / "int8", kind="int8", config=source.config, tokenizer=tokenizer)
    with pytest.raises(SeekVLError, match=r"int8 is quantised, and what llama\.cpp loads is made from plain"):
        bench(str(tmp_path / "int8"), Settings(**SINGLE, peer="llama.cpp"), say=print)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SeekVLError, match=r"needs the package llama_cpp: pip install 'seekvl\[llama\]'"):
        bench(str(SMALL), Settings(**SINGLE, peer="llama.cpp"), say=print)


@pytest.mark.usefixtures("small")
def test_a_quantised_model_is_measured_as_such() -> None:
    said: list[str] = []
    plain, report = (
        bench(str(SMALL), Settings(**QUICK, quantize=kind), say=said.append) for kind in (None, "int8")
    )
    assert "writing the weights in int8, unless they are there" in said
    assert (plain.quantize, report.quantize, report.dtype) == (None, "int8", "float32")
    reads = []
    for found in (plain, report):
        (figure,) = (figure for figure in found.figures if figure.name == "decode, batch 1")
        assert figure.work is not None
        reads.append(figure.work.read_bytes)
    assert reads[1] < 0.6 * reads[0], "the cache stays as it is"
    assert report.table().startswith(f"{SMALL} (folder weights), int8, 1 threads")
    assert json.loads(report.json())["quantize"] == "int8"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"tokens": 1}, "tokens must be at least 2, not 1"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"quiet": float("nan")}, "quiet must be at least 0, not nan"),
        ({"batches": (4, 0)}, "at least 1 answer, not 0"),
        ({"peer": "ollama"}, r"peer 'ollama' is unknown; use transformers or llama\.cpp"),
        ({"peer": "transformers", "quantize": "int8"}, "measure int8 without a peer, or beside llama"),
        ({"peer": "llama.cpp"}, "one answer at a time: leave larger batches out"),
    ],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(SeekVLError, match=says):
        Settings(**QUICK | wrong)


def test_batches_are_sorted_and_hold_one() -> None:
    assert Settings(**QUICK | {"batches": (16, 4, 4)}).batches == (1, 4, 16)
    assert Settings(threads=1).batches == (1, 4, 16)
    assert Settings(threads=1, peer="llama.cpp").batches == (1,)


def test_a_peer_that_lacks_the_model() -> None:
    for peer in ("transformers", "llama.cpp"):
        with pytest.raises(SeekVLError, match=f"{peer} is measured with DeepSeek-VL only"):
            bench("deepseek-vl2-tiny", Settings(**SINGLE, peer=peer), say=print)
    with pytest.raises(SeekVLError, match=r"transformers cannot load seekvl-nano .*downsample channels"):
        bench("seekvl-nano", Settings(**QUICK, peer="transformers"), say=print)


def test_a_device_that_is_not_there_or_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SeekVLError, match="seekvl computes on"):
        bench("seekvl-nano", Settings(**SINGLE, device="meta"), say=print)
    if not torch.cuda.is_available():
        with pytest.raises(SeekVLError, match="sees no CUDA here"):
            bench("seekvl-nano", Settings(**SINGLE, device="cuda"), say=print)
    monkeypatch.setattr(speed, "select_device", torch.device)
    with pytest.raises(SeekVLError, match=r"llama\.cpp is measured on the CPU, not on cuda"):
        bench("seekvl-nano", Settings(**SINGLE, device="cuda", peer="llama.cpp"), say=print)
    with pytest.raises(
        SeekVLError, match="int8 in the format of the kernels is computed on the CPU alone, not on cuda"
    ):
        bench("seekvl-nano", Settings(**SINGLE, device="cuda", quantize="int8"), say=print)
    with pytest.raises(SeekVLError, match="the CPU or a CUDA device is measured, not mps"):
        bench("seekvl-nano", Settings(**SINGLE, device="mps"), say=print)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(SeekVLError, match="downloads nothing"):
        bench("nobody/nothing", Settings(**QUICK), say=print)


def test_a_folder_to_keep_is_for_published_names(tmp_path: Path) -> None:
    with pytest.raises(SeekVLError, match="seekvl-nano has its own"):
        bench("seekvl-nano", Settings(**QUICK), folder=tmp_path, say=print)
    with pytest.raises(SeekVLError, match="holds another model"):
        bench("deepseek-vl-7b-chat", Settings(**QUICK), folder=BUNDLED["seekvl-nano"], say=print)


def test_what_a_process_cannot_do_is_one_line() -> None:
    job = speed._job("seekvl", "seekvl-nano", Settings(**QUICK | {"tokens": 5000}, dtype="float32"))
    with pytest.raises(
        SeekVLError, match=r"answers of 5,000 tokens were asked for, .* leaves room for 1,\d+"
    ):
        speed._run(job)
