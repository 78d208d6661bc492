import json
from pathlib import Path

from PIL import Image
from typer.testing import CliRunner

from seekvl.cli.main import app

runner = CliRunner()


def told(*args: str) -> str:
    done = runner.invoke(app, ["plan", *args])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_published_model_is_planned_by_name() -> None:
    text = told("deepseek-vl2-tiny", "--picture", "1920x1080", "--device", "cpu")
    assert "1920 x 1080 px  grid 4 x 2  9 tiles  1,807 tokens" in text
    assert "prompt       1,871 of 4,096 tokens" in text
    assert "free here" in text


def test_the_bundled_model_is_the_default(tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(turned, exif=exif)
    report = json.loads(told("--picture", str(turned), "--json"))
    assert report["model"] == "seekvl-nano"
    assert report["pictures"] == [{"size": [20, 40], "grid": None, "views": 1, "tokens": 100}]
    assert report["bytes"]["total"] == sum(v for k, v in report["bytes"].items() if k != "total")


def test_what_makes_it_fit_is_named() -> None:
    report = json.loads(told("deepseek-vl2-tiny", "--dtype", "float32", "--device", "cpu", "--json"))
    assert report["fits"]["8"] == {"bytes": 8 * 2**30, "fits": False, "with": ["dtype bfloat16"]}
    assert report["fits"]["80"]["fits"]
    text = told("deepseek-vl2-tiny", "--dtype", "float32", "--device", "cpu")
    assert "fits with dtype bfloat16" in text
    assert "does not fit" in told("deepseek-vl2", "--device", "cpu")


def test_a_device_that_is_not_here_can_be_planned_for() -> None:
    report = json.loads(told("deepseek-vl-7b-chat", "--device", "cuda", "--json"))
    assert (report["device"], report["dtype"]) == ("cuda", "bfloat16")
    assert not report["fits"]["8"]["fits"]


def test_a_quantised_model_is_planned(tmp_path: Path) -> None:
    asked = ("deepseek-vl-1.3b-chat", "--device", "cpu", "--dtype", "bfloat16")
    plain = json.loads(told(*asked, "--json"))
    report = json.loads(told(*asked, "--quantize", "int4", "--json"))
    assert (plain["quantize"], report["quantize"]) == (None, "int4")
    assert 0.26 < report["bytes_per_token"] / plain["bytes_per_token"] < 0.4, "the cache stays as it is"
    assert report["bytes"]["weights"] < 0.6 * plain["bytes"]["weights"]
    assert "bfloat16, language model in int4 on cpu" in told(*asked, "--quantize", "int4")
    nano = ("--dtype", "float32", "--device", "cpu")
    wanted = json.loads(told("--quantize", "int8", *nano, "--json"))
    assert runner.invoke(app, ["convert", "seekvl-nano", str(tmp_path), "--quantize", "int8"]).exit_code == 0
    stored = json.loads(told(str(tmp_path), *nano, "--json"))
    assert (stored["quantize"], stored["bytes_per_token"]) == ("int8", wanted["bytes_per_token"])


def test_what_is_wrong_is_one_line() -> None:
    for args, said in (
        (["nobody/nothing"], "downloads nothing"),
        (["deepseek-vl2-tiny", "--picture", "0x7"], "0x7"),
        (["deepseek-vl-7b-chat", "--picture", "missing.png"], "missing.png"),
        (["deepseek-vl-7b-chat", "--quantize", "int8", "--device", "cuda"], "on the CPU alone, not on cuda"),
    ):
        done = runner.invoke(app, ["plan", *args])
        assert done.exit_code == 1
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
