"""How verbs start and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import seekvl
from tests.cli.conftest import GOLDEN, Run

VERBS = (
    (),
    ("ask",),
    ("chat",),
    ("convert",),
    ("verify",),
    ("eval",),
    ("eval", "nano"),
    ("train",),
    ("train", "nano"),
)


@pytest.mark.parametrize("verb", VERBS)
def test_help_names_the_options_and_an_example(run: Run, verb: tuple[str, ...]) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert "Example: seekvl" in result.stdout


def test_help_is_instant_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, typer.testing, seekvl.cli.main as m\n"
        f"for verb in {VERBS!r}:\n"
        "    assert typer.testing.CliRunner().invoke(m.app, [*verb, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'tokenizers', 'safetensors', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version(run: Run) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"seekvl {seekvl.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [("nothing",), ("ask",), ("ask", "hi", "--nothing"), ("ask", "hi", "--top-k", "many"), ("chat", "hi")],
)
def test_wrong_call_is_exit_2(run: Run, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr


def test_error_is_one_line_on_stderr(run: Run) -> None:
    result = run("ask", "hi", "--model", "no-such-model")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: there is no folder 'no-such-model'")
    assert result.stderr.count("\n") == 1


def test_debug_lets_the_error_through(run: Run) -> None:
    result = run("--debug", "ask", "hi", "--model", "no-such-model")
    assert isinstance(result.exception, seekvl.SeekVLError)


def test_file_that_cannot_be_written_is_one_line(run: Run, model: tuple[str, ...], tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    result = run("eval", "nano", "--n", "1", "--kinds", "exist", "--out", tmp_path / "a.json", *model)
    assert result.exit_code == 1
    assert "Permission denied" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_is_one_line_and_130(model: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    picture = str(GOLDEN / "images" / "text_320x200.png")
    command = ["ask", picture, "Describe it.", "--max-new-tokens", "16000", "--draw", str(out), *model]
    code = (
        "import sys, seekvl.cli.ask as ask\n"
        "from seekvl.cli.main import app\n"
        "load = ask.options.load_vlm\n"
        "def told(*a, **k):\n"
        "    vlm = load(*a, **k); print('loaded', file=sys.stderr, flush=True); return vlm\n"
        "ask.options.load_vlm = told\n"
        "app(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "loaded\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.strip() == "interrupted"
    assert list(tmp_path.iterdir()) == []
