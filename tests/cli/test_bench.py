import json
from pathlib import Path

import pytest
from PIL import Image

from seekvl.evals import speed
from tests.cli.conftest import Run

QUICK = ("--batch", "1", "--tokens", "2", "--rounds", "1", "--threads", "1", "--quiet", "0")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of small matrices: they are not what is tested here."""
    whole = speed.measure_ceilings
    monkeypatch.setattr(
        speed, "measure_ceilings", lambda **chosen: whole(**chosen, memory=1 << 20, side=64, turns=1)
    )


def test_figures_and_plot_of_the_bundled_model(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("bench", *QUICK, "--json", "--plot", tmp_path / "roof.png")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert report["model"] == "seekvl-nano"
    assert set(report["figures"]) == {
        *("load", "first token", "vision", "prefill", "decode, batch 1", "memory, batch 1")
    }
    assert report["figures"]["decode, batch 1"]["bound"] in ("memory", "arithmetic")
    assert Image.open(tmp_path / "roof.png").width > 600


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--plot", "roof.svg"), 1, "ends in .png"),
        (("nobody/nothing",), 1, "downloads nothing"),
        (("deepseek-vl2-tiny", "--peer", "transformers"), 1, "measured with DeepSeek-VL only"),
        (("--peer", "transformers"), 1, "transformers cannot load seekvl-nano"),
        (("--peer", "ollama"), 2, "ollama"),
        (("--quantize", "int8", "--peer", "transformers"), 1, "measure int8 without a peer"),
        (("--peer", "llama.cpp", "--batch", "4"), 1, "one answer at a time"),
        (("--quantize", "int2"), 2, "int2"),
        (("--batch", "0"), 2, "greater than or equal to 1"),
        (("--device", "tpu"), 1, "tpu"),
        (("--tokens", "1"), 2, "greater than or equal to 2"),
    ],
)
def test_what_is_wrong_is_said(run: Run, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run("bench", *arguments)
    assert done.exit_code == code
    assert says in done.stderr
    if code == 1:
        assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
        assert "Traceback" not in done.stderr
