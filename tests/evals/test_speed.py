import json
from pathlib import Path
from typing import Any

import pytest

from seekvl.evals import speed
from seekvl.evals.speed import Settings, bench
from seekvl.runtime import SeekVLError
from seekvl.weights.load import BUNDLED

SMALL = Path(__file__).parents[1] / "golden" / "vl1-siglip"
QUICK: dict[str, Any] = {"threads": 1, "batches": (2,), "tokens": 3, "rounds": 1, "quiet": 0.0}


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
def test_a_quantised_model_is_measured_as_such() -> None:
    said: list[str] = []
    plain, report = (
        bench(str(SMALL), Settings(**QUICK, quantize=kind), say=said.append) for kind in (None, "int8")
    )
    assert "writing the weights in int8" in said
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
        ({"peer": "ollama"}, "peer 'ollama' is unknown; use transformers"),
    ],
)
def test_settings_that_cannot_be_meant(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(SeekVLError, match=says):
        Settings(**QUICK | wrong)


def test_batches_are_sorted_and_hold_one() -> None:
    assert Settings(**QUICK | {"batches": (16, 4, 4)}).batches == (1, 4, 16)


def test_a_peer_that_lacks_the_model() -> None:
    with pytest.raises(SeekVLError, match="transformers has no DeepSeek-VL2"):
        bench("deepseek-vl2-tiny", Settings(**QUICK, peer="transformers"), say=print)
    with pytest.raises(SeekVLError, match=r"transformers cannot load seekvl-nano .*downsample channels"):
        bench("seekvl-nano", Settings(**QUICK, peer="transformers"), say=print)


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
