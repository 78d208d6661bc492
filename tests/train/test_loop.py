import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seekvl.data.collate import Batch
from seekvl.models.vl import VL
from seekvl.runtime import SeekVLError
from seekvl.train import checkpoint
from seekvl.train.loop import Moment, Run, RunInterruptedError, train
from seekvl.train.metrics import read_log
from seekvl.train.objective import Loss, next_token_loss
from seekvl.train.stage import Group
from tests.train.conftest import ALL, EXPERTS, LANGUAGE, ROWS, Toy, ToyRun, tiny_vl, tiny_vl2, toy_stage


def losses(run: Run[VL, Batch]) -> list[float]:
    return [record.loss for record in read_log(run.folder / "log.jsonl")]


def weights(model: VL) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def stop_after(step: int):
    def hook(moment: Moment) -> None:
        if moment.step == step:
            raise KeyboardInterrupt

    return hook


def test_toy_of_words_learns(toy_run: ToyRun) -> None:
    run = toy_run(steps=150)
    summary = train(run, show=False)
    seen = losses(run)
    assert len(seen) == summary.steps == 150
    assert seen[0] > 3.0
    assert sum(seen[-10:]) / 10 < 0.2


def test_toy_of_pictures_learns_through_tower_and_adaptor(toy_run: ToyRun) -> None:
    run = toy_run(batch=Toy(pictures=True), stage=toy_stage(150, groups=ALL))
    before = weights(run.model)
    train(run, show=False)
    assert sum(losses(run)[-10:]) / 10 < 0.2
    assert not torch.equal(before["vision.patch_embed.weight"], run.model.vision.patch_embed.weight)


def test_frozen_parameters_stay_bit_for_bit(toy_run: ToyRun) -> None:
    groups = (
        Group(pattern="adaptor[.].*"),
        Group(pattern="(vision|language)[.].*", frozen=True, weight_decay=0.1),
    )
    run = toy_run(batch=Toy(pictures=True), stage=toy_stage(5, groups=groups))
    before = weights(run.model)
    train(run, show=False)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(before[name], tensor) != name.startswith("adaptor."), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_interrupted_run_goes_on_with_equal_losses(toy_run: ToyRun, precision: str) -> None:
    whole = toy_run(folder="whole", precision=precision)
    train(whole, show=False)
    broken = toy_run(folder="broken", precision=precision)
    with pytest.raises(
        RunInterruptedError, match="KeyboardInterrupt: stopped after step 5 of 12; resume from"
    ):
        train(broken, hooks=[stop_after(5)], show=False)
    assert checkpoint.latest(broken.folder) == checkpoint.step_folder(broken.folder, step=5)
    again = toy_run(folder="broken", precision=precision, model=tiny_vl(seed=99))
    train(again, resume=True, show=False)
    assert losses(again) == losses(whole)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


def sparse(run: "Run[VL, Batch]", *, gamma: float | None = 0.01, seed: int = 0) -> "Run[VL, Batch]":
    """Return the run with a network with experts in the place of its own."""
    stage = replace(toy_stage(), groups=EXPERTS, bias_gamma=gamma)
    return replace(run, model=tiny_vl2(seed), stage=stage)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_experts_and_their_biases_go_on_with_equal_losses(toy_run: ToyRun, precision: str) -> None:
    whole = sparse(toy_run(folder="whole", precision=precision))
    train(whole, show=False)
    broken = sparse(toy_run(folder="broken", precision=precision))
    with pytest.raises(RunInterruptedError):
        train(broken, hooks=[stop_after(5)], show=False)
    again = sparse(toy_run(folder="broken", precision=precision), seed=99)
    train(again, resume=True, show=False)
    assert losses(again) == losses(whole)
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
    bias = again.model.language.layers[1].mlp.gate.bias
    assert bias.dtype == torch.float32
    assert bias.any()


def test_the_log_tells_how_busy_the_fullest_expert_was(toy_run: ToyRun) -> None:
    run = sparse(toy_run())
    train(run, show=False)
    records = read_log(run.folder / "log.jsonl")
    assert all(record.expert_load is not None and 1 <= record.expert_load <= 4 for record in records)
    plain = toy_run(folder="plain", steps=2)
    train(plain, show=False)
    assert [record.expert_load for record in read_log(plain.folder / "log.jsonl")] == [None, None]


def test_another_step_of_the_biases_is_another_run(toy_run: ToyRun) -> None:
    train(sparse(toy_run()), show=False)
    with pytest.raises(SeekVLError, match=r"was trained with stage.bias_gamma 0.01, this run has None"):
        train(sparse(toy_run(), gamma=None), resume=True, show=False)


def test_a_run_from_before_there_were_biases_goes_on(toy_run: ToyRun) -> None:
    run = toy_run()
    with pytest.raises(RunInterruptedError):
        train(run, hooks=[stop_after(5)], show=False)
    state = checkpoint.step_folder(run.folder, step=5) / "state.json"
    saved = json.loads(state.read_text())
    del saved["settings"]["stage.bias_gamma"]
    state.write_text(json.dumps(saved))
    assert train(toy_run(), resume=True, show=False).steps == 12


def test_random_numbers_of_the_model_go_on_too(toy_run: ToyRun) -> None:
    def noisy(model: VL, batch: Batch) -> Loss:
        loss = next_token_loss(model, batch)
        return Loss(total=loss.total * (1 + 0.1 * torch.rand(())), weight=loss.weight)

    whole = toy_run(folder="whole", objective=noisy, workers=1)
    train(whole, show=False)
    broken = toy_run(folder="broken", objective=noisy)
    with pytest.raises(RunInterruptedError):
        train(broken, hooks=[stop_after(4)], show=False)
    train(replace(broken, model=tiny_vl(1)), resume=True, show=False)
    assert losses(broken) == losses(whole)


def test_crash_goes_on_from_the_last_checkpoint_and_repeats_no_line(toy_run: ToyRun) -> None:
    def crash(moment: Moment) -> None:
        if moment.step == 7:
            raise RuntimeError("power cut")

    whole = toy_run(folder="whole")
    train(whole, show=False)
    broken = toy_run(folder="broken", checkpoint_every=3)
    with pytest.raises(RuntimeError, match="power cut"):
        train(broken, hooks=[crash], show=False)
    assert len(losses(broken)) == 7
    train(toy_run(folder="broken", checkpoint_every=3), resume=True, show=False)
    assert losses(broken) == losses(whole)


def test_losses_do_not_depend_on_the_number_of_workers(toy_run: ToyRun) -> None:
    seen = []
    for workers in (0, 1, 2):
        run = toy_run(folder=f"workers{workers}", steps=6, workers=workers)
        train(run, show=False)
        seen.append(losses(run))
    assert seen[0] == seen[1] == seen[2]


def test_hooks_and_checkpoints_change_no_loss(toy_run: ToyRun) -> None:
    plain = toy_run(folder="plain")
    train(plain, show=False)
    steps: list[int] = []
    busy = toy_run(folder="busy", checkpoint_every=1)
    train(busy, hooks=[lambda moment: steps.append(moment.step)], show=False)
    assert steps == list(range(1, 13))
    assert losses(busy) == losses(plain)


def test_newest_checkpoints_are_kept(toy_run: ToyRun) -> None:
    run = toy_run(checkpoint_every=2, keep=3)
    summary = train(run, show=False)
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "log.jsonl",
        "step-00000008",
        "step-00000010",
        "step-00000012",
    ]
    assert summary.checkpoint == run.folder / "step-00000012"


def test_finished_run_only_loads_its_weights(toy_run: ToyRun) -> None:
    run = toy_run()
    train(run, show=False)
    other = toy_run(model=tiny_vl(seed=5))
    assert train(other, resume=True, show=False).checkpoint == run.folder / "step-00000012"
    assert torch.equal(other.model.language.norm.weight, run.model.language.norm.weight)
    assert len(losses(run)) == 12


def test_folder_of_another_run_is_refused(toy_run: ToyRun) -> None:
    train(toy_run(), show=False)
    with pytest.raises(
        SeekVLError, match=r"holds the run up to step-00000012; resume it or use another folder"
    ):
        train(toy_run(), show=False)
    with pytest.raises(SeekVLError, match=r"was trained with stage.lr 0.003, this run has 0.5"):
        train(toy_run(stage=toy_stage(12, lr=0.5)), resume=True, show=False)
    with pytest.raises(SeekVLError, match=r"was trained with seed 0, this run has 1"):
        train(toy_run(seed=1), resume=True, show=False)


def test_a_step_that_is_not_finite_is_skipped_and_a_series_stops(toy_run: ToyRun) -> None:
    def spoiled(bad: range):
        calls = iter(range(1000))

        def objective(model: VL, batch: Batch) -> Loss:
            loss = next_token_loss(model, batch)
            return Loss(total=loss.total * float("nan" if next(calls) in bad else 1.0), weight=loss.weight)

        return objective

    run = toy_run(folder="one", objective=spoiled(range(3, 4)))
    train(run, show=False)
    records = read_log(run.folder / "log.jsonl")
    assert [record.step for record in records if record.skipped] == [3]
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())
    with pytest.raises(SeekVLError, match=r"step 5 is number 3 in a row without finite numbers \(loss nan"):
        train(toy_run(folder="many", objective=spoiled(range(3, 99)), max_skipped=3), show=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_is_one_line_that_names_the_step(toy_run: ToyRun, workers: int) -> None:
    with pytest.raises(SeekVLError) as caught:
        train(toy_run(batch=Spoiled(), workers=workers), show=False)
    assert str(caught.value) == "step 2: sample 812 is empty"


class Spoiled:
    def __call__(self, step: int) -> Batch:
        if step == 2:
            raise SeekVLError("sample 812 is empty")
        return Toy()(step)


def test_batch_of_another_size_is_refused(toy_run: ToyRun) -> None:
    run = toy_run(stage=replace(toy_stage(), batch_size=5))
    with pytest.raises(SeekVLError, match=f"step 0: {ROWS} samples, but the stage has batch_size 5"):
        train(run, show=False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoint_every", 0),
        ("keep", 0),
        ("max_skipped", 0),
        ("workers", -1),
        ("threads", 0),
        ("precision", "int8"),
    ],
)
def test_impossible_settings_are_refused(toy_run: ToyRun, field: str, value: object) -> None:
    with pytest.raises(SeekVLError, match=f"run: {field}"):
        toy_run(**{field: value})


def test_threads_and_signals_are_given_back(toy_run: ToyRun) -> None:
    before = torch.get_num_threads(), signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    train(toy_run(steps=2, threads=2), show=False)
    assert before == (
        torch.get_num_threads(),
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
    )


def test_progress_goes_to_stderr_as_plain_lines(toy_run: ToyRun, capsys: pytest.CaptureFixture[str]) -> None:
    train(toy_run(steps=3))
    out, err = capsys.readouterr()
    assert out == ""
    assert "language[.].*" in err
    assert "frozen" in err
    assert "toy  step 3/3  loss all" in err


def test_log_names_the_stream(toy_run: ToyRun) -> None:
    run = toy_run(steps=3, kind=lambda step: "language" if step % 2 else "multimodal")
    train(run, show=False)
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["multimodal", "language", "multimodal"]


SIGTERM_PROGRAM = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.train.conftest import Toy, tiny_vl, toy_stage
from seekvl.runtime import SeekVLError
from seekvl.train.loop import Run, train
from seekvl.train.objective import next_token_loss

def slow(moment):
    print(moment.step, flush=True)
    time.sleep(0.05)

run = Run(model=tiny_vl(), stage=toy_stage(2000), batch=Toy(), objective=next_token_loss,
          folder=Path(sys.argv[1]), seed=0, threads=1, workers=1)
try:
    train(run, hooks=[slow], show=False)
except SeekVLError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_saves_and_stops(tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", SIGTERM_PROGRAM, str(folder), str(Path(__file__).parents[2])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "1\n"
        os.killpg(child.pid, number)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 1
    assert err.strip().splitlines()[-1].startswith(f"{number.name}: stopped after step ")
    path = checkpoint.latest(folder)
    assert path is not None
    assert checkpoint.read_progress(path).step == len(read_log(folder / "log.jsonl"))
    assert [entry.name for entry in folder.iterdir() if entry.name.startswith(".")] == []


def test_frozen_table_is_checked_before_anything_is_written(toy_run: ToyRun) -> None:
    run = toy_run(stage=toy_stage(groups=(*LANGUAGE, Group(pattern="visoin[.].*"))))
    with pytest.raises(SeekVLError, match=r"group 'visoin\[\.\]\.\*' matches no parameter"):
        train(run, show=False)
    assert not run.folder.exists()
