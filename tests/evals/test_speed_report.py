import json
from dataclasses import replace

import pytest

from seekvl.evals.ceilings import Ceilings
from seekvl.evals.speed_report import Figure, Report, Work, works
from seekvl.models.cost import active_parameters, cache_bytes_per_token
from seekvl.presets import CHECKPOINTS, VL_1B

VL2_TINY = CHECKPOINTS["deepseek-ai/deepseek-vl2-tiny"]
CEILINGS = Ceilings(threads=2, read=36e9, reader="kernels", operations={"bfloat16": 455e9, "int8": 900e9})


def report(*, peer: bool = True) -> Report:
    work = Work(read_bytes=2.5e9, operations=2.6e9)
    return Report(
        model="m",
        weights="random",
        dtype="bfloat16",
        quantize=None,
        level="avx2",
        device="cpu",
        machine="2 x CPU",
        versions={"seekvl": "0"},
        rounds=3,
        tokens=32,
        prompt_tokens=630,
        image_tokens=576,
        neighbours=(0.05, 0.1),
        peer="transformers" if peer else None,
        ceilings=CEILINGS,
        figures=(
            Figure(name="load", unit="s", ours=0.5, peer=1.0 if peer else None),
            Figure(
                name="decode, batch 1",
                unit="tok/s",
                ours=10.0,
                peer=4.0 if peer else None,
                work=work,
                seconds=0.1,
                share=0.69,
                bound="memory",
            ),
        ),
    )


def test_the_table_names_every_figure() -> None:
    text = report().table()
    assert "memory read               36.0 GB/s" in text
    assert "int8 products            900.0 GOP/s" in text
    (line,) = (line for line in text.splitlines() if line.startswith("decode, batch 1"))
    assert line.split() == ["decode,", "batch", "1", "10.000", "tok/s", "69", "%", "memory", "4.000", "2.50"]
    assert "0.10 at most" in text


def test_json_is_one_line() -> None:
    said = report().json()
    assert "\n" not in said
    figures = json.loads(said)["figures"]
    assert figures["load"] == {
        "ours": 0.5,
        "unit": "s",
        "peer": 1.0,
        "ratio": 0.5,
        "peer_name": "transformers",
    }
    assert figures["decode, batch 1"]["share"] == 0.69
    assert set(json.loads(report(peer=False).json())["figures"]["load"]) == {"ours", "unit"}


def test_the_work_of_a_dense_step() -> None:
    found = works(VL_1B.model, prompt=630, views=1, tokens=32, batches=(1, 4), itemsize=2)
    weights = 2 * active_parameters(VL_1B.model.language)
    cache = 646 * cache_bytes_per_token(VL_1B.model.language)
    assert found["decode, batch 1"].read_bytes == weights + cache
    assert found["decode, batch 4"].read_bytes == weights + 4 * cache
    assert found["decode, batch 4"].operations == 4 * found["decode, batch 1"].operations
    assert found["vision"].operations > 0
    less = works(VL_1B.model, prompt=630, views=1, tokens=32, batches=(1,), itemsize=2, kind="int4")
    saved = weights + cache - less["decode, batch 1"].read_bytes
    assert saved / weights == pytest.approx(1 - 4.5 / 16, rel=0.01), "4.5 bits instead of 16 a number"
    assert less["vision"] == found["vision"]
    assert found["prefill"].operations > 600 * found["decode, batch 1"].operations * 0.8


def test_operations_with_packed_matrices_are_told_apart() -> None:
    asked = {"prompt": 630, "views": 1, "tokens": 32, "batches": (1, 4), "itemsize": 2}
    plain, packed = works(VL_1B.model, **asked), works(VL_1B.model, **asked, kind="int8")
    assert all(work.whole_operations == 0 for work in plain.values())
    assert packed["vision"] == plain["vision"], "what of it is quantised depends on its numbers"
    for name in ("prefill", "decode, batch 1", "decode, batch 4"):
        assert packed[name].operations == plain[name].operations
        attention = packed[name].operations - packed[name].whole_operations
        assert 0 < attention < 0.1 * packed[name].operations, name
    language = VL_1B.model.language
    assert packed["decode, batch 4"].whole_operations == 4 * 2 * active_parameters(language)
    head = language.width * language.vocab_size
    matrices = active_parameters(language) - head
    assert packed["prefill"].whole_operations == 2 * (630 * matrices + head)


def test_of_packed_experts_those_count_that_a_token_meets() -> None:
    asked = {"prompt": 100, "views": 1, "tokens": 32, "batches": (1,), "itemsize": 2}
    found = works(VL2_TINY.model, **asked, kind="int4")["prefill"]
    rest = found.operations - found.whole_operations
    assert 0 < rest < 0.2 * found.operations, "attention, routers, and the latent's expansion stay plain"


def test_words_alone_are_said_to_be_so() -> None:
    words = replace(report(), image_tokens=0, peer="llama.cpp")
    assert "prompt of 630 tokens, all of them words; answers of 32" in words.table()
    assert (
        "llama.cpp runs the text part only; seekvl loads and holds the picture towers, too" in words.table()
    )
    assert "text part" not in report().table()


def test_a_gpu_copies() -> None:
    ceilings = replace(CEILINGS, reader="copy", read=4e12)
    found = replace(report(), device="cuda", machine="GPU", level=None, ceilings=ceilings)
    assert "torch on cuda" in found.table()
    assert "memory copied           4000.0 GB/s" in found.table()
    assert json.loads(found.json())["device"] == "cuda"
