import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seekvl import runtime
from seekvl.runtime import SeekVLError, atomic_file


def test_an_error_of_ours_is_a_value_error() -> None:
    assert issubclass(SeekVLError, ValueError)


def test_seeds_are_stable_and_differ_by_purpose() -> None:
    assert runtime.seed_for(1, "order", 2) == runtime.seed_for(1, "order", 2)
    seeds = {runtime.seed_for(s, p, i) for s in (0, 1) for p in ("a", "b") for i in range(10)}
    assert len(seeds) == 40
    assert all(0 <= seed < 2**63 for seed in seeds)
    fresh = [sys.executable, "-c", "from seekvl.runtime import seed_for; print(seed_for(1, 'order', 2))"]
    assert int(subprocess.run(fresh, capture_output=True, check=True).stdout) == runtime.seed_for(
        1, "order", 2
    )


def test_generators_follow_the_seed() -> None:
    assert torch.equal(
        torch.rand(3, generator=runtime.torch_generator(4, "x")),
        torch.rand(3, generator=runtime.torch_generator(4, "x")),
    )
    assert runtime.numpy_generator(4, "x").random() == runtime.numpy_generator(4, "x").random()


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(SeekVLError, match=r"pip install 'seekvl\[data\]'"):
        runtime.require("no_such_package.sub", extra="data")
    assert runtime.require("json", extra="data").dumps(1) == "1"


@pytest.mark.parametrize(
    ("parameters", "dtype"),
    [(4_000_000, torch.float32), (500_000_000, torch.float32), (1_975_235_584, torch.bfloat16)],
)
def test_auto_dtype_on_a_cpu_follows_the_size(parameters: int, dtype: torch.dtype) -> None:
    assert runtime.select_dtype("auto", device=torch.device("cpu"), parameters=parameters) == dtype


def test_dtypes_by_name_and_by_value() -> None:
    cpu = torch.device("cpu")
    assert runtime.select_dtype("float16", device=cpu, parameters=1) == torch.float16
    assert runtime.select_dtype(torch.bfloat16, device=cpu, parameters=1) == torch.bfloat16
    for wrong in ("int8", torch.int8, ["int8"]):
        with pytest.raises(SeekVLError, match="int8"):
            runtime.select_dtype(wrong, device=cpu, parameters=1)  # type: ignore[arg-type]


def test_devices_that_do_not_exist_are_refused() -> None:
    assert runtime.select_device("cpu") == torch.device("cpu")
    with pytest.raises(SeekVLError, match="not a torch device"):
        runtime.select_device("gpu0")
    with pytest.raises(SeekVLError, match="not a torch device"):
        runtime.select_device(None)  # type: ignore[arg-type]
    for elsewhere in ("meta", "xla"):
        with pytest.raises(SeekVLError, match="none that seekvl computes on"):
            runtime.select_device(elsewhere)
    if not torch.backends.mps.is_available():
        with pytest.raises(SeekVLError, match="sees no MPS here"):
            runtime.select_device("mps")
    if not torch.cuda.is_available():
        with pytest.raises(SeekVLError, match="sees no CUDA"):
            runtime.select_device("cuda")


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.write_text("old")

    def interrupted() -> None:
        with atomic_file(target) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    with atomic_file(target) as part:
        part.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    with pytest.raises(SeekVLError, match="does not exist"), atomic_file(tmp_path / "no" / "file"):
        pass
