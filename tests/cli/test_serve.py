"""`seekvl serve`: what its flags become. What a server then does is tested in tests/serve."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from seekvl.cli.main import app
from seekvl.serve.settings import Settings


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What servers are told; none is started."""
    found: list[Settings] = []

    def serve(settings: Settings) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr("seekvl.serve.run.serve", serve)
    return found


def test_defaults_are_those_of_the_settings(told: list[Settings]) -> None:
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert told == [Settings()]


def test_flags_of_the_predictions_api(told: list[Settings], tmp_path: Path) -> None:
    flags = ["--store", f"sqlite:///{tmp_path}/s.db", "--cog-inputs", "simple"]
    flags += ["--keep-predictions", "60", "--max-predictions", "5", "--keep-files", "30"]
    flags += ["--max-file-bytes", "1000", "--upload-url", "https://example.org/put"]
    flags += ["--log-prompts", str(tmp_path / "log")]
    run = CliRunner(env={"SEEKVL_WEBHOOK_SECRET": "whsec_AAEC"})
    assert run.invoke(app, ["serve", *flags]).exit_code == 0
    assert told == [
        Settings(
            store=f"sqlite:///{tmp_path}/s.db",
            cog_inputs="simple",
            prediction_seconds=60,
            max_predictions=5,
            file_seconds=30,
            max_file_bytes=1000,
            upload_url="https://example.org/put",
            webhook_secret="whsec_AAEC",
            log_prompts=tmp_path / "log",
        )
    ]


@pytest.mark.parametrize(
    "flags",
    [["--store", "mysql://x"], ["--webhook-secret", "open sesame"], ["--upload-url", "ftp://example.org"]],
)
def test_what_cannot_be_meant_ends_in_one_line(told: list[Settings], flags: list[str]) -> None:
    done = CliRunner().invoke(app, ["serve", *flags])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert told == []
