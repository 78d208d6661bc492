import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seekvl.engine.plan import Plan, Workload, find_config, plan, plan_pictures, remedy
from seekvl.evals.random_weights import write_random
from seekvl.models.cost import cache_bytes_per_token, parameters
from seekvl.presets import CHECKPOINTS, SHORT_NAMES
from seekvl.processing.encode import Processor
from seekvl.runtime import SeekVLError
from seekvl.weights.load import load_checkpoint

GIB = 2**30
PLENTY = 1024 * GIB


def planned(name: str, available: int = PLENTY, **workload: object) -> Plan:
    return plan(find_config(name), Workload(**workload), available=available)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "max_tiles"),
    [([(1920, 1080)], None), ([(100, 100), (30, 900)], None), ([(500, 300)] * 3, None), ([(900, 900)], 2)],
)
def test_pictures_cost_what_the_processor_counts(sizes: list[tuple[int, int]], max_tiles: int | None) -> None:
    from PIL import Image

    folder = Path(__file__).parents[1] / "golden" / "vl2-tiny-like"
    config = find_config(folder)
    checkpoint = load_checkpoint(folder, device="cpu", dtype="float32", max_tiles=max_tiles)
    assert isinstance(checkpoint.processor, Processor)
    parts = [{"type": "image", "image": Image.new("RGB", size)} for size in sizes]
    inputs = checkpoint.processor([{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}])
    found = plan_pictures(config, tuple(sizes), max_tiles=max_tiles)
    assert tuple(picture.tokens for picture in found) == inputs.bill.image_tokens
    assert inputs.pixels is not None
    assert sum(picture.views for picture in found) == len(inputs.pixels)


def test_weights_of_a_mapped_file_leave_out_the_embedding() -> None:
    config = find_config("deepseek-vl-1.3b-chat")
    numbers = sum(parameters(config.model).values())
    rows = config.model.language.vocab_size * config.model.language.width
    assert planned("deepseek-vl-1.3b-chat").weights == 2 * (numbers - rows)
    assert planned("deepseek-vl-1.3b-chat", dtype=torch.float16).weights == 2 * numbers
    assert planned("deepseek-vl-1.3b-chat", cuda=True).weights == 2 * numbers


def test_cache_holds_all_answers_at_full_length() -> None:
    per_token = cache_bytes_per_token(find_config("deepseek-vl2-tiny").model.language)
    found = planned("deepseek-vl2-tiny", text_tokens=100, new_tokens=156, batch=3)
    assert found.cache == 3 * 256 * per_token
    assert planned("deepseek-vl2-tiny", text_tokens=100, new_tokens=157).cache == 512 * per_token


def test_the_parts_add_up() -> None:
    found = planned("deepseek-vl2-small", pictures=((800, 600),))
    assert found.total == found.weights + found.cache + found.activations + found.program
    assert found.prompt_tokens == 64 + found.pictures[0].tokens


def test_less_memory_means_smaller_pieces() -> None:
    config = find_config("deepseek-vl2-tiny")
    work = Workload(pictures=((1920, 1080),))
    needed = plan(config, work, available=PLENTY)
    tight = plan(config, work, available=needed.total - needed.activations // 2)
    assert tight.activations < needed.activations


def test_the_mildest_remedy_is_found() -> None:
    config = find_config("deepseek-vl2-tiny")
    work = Workload(pictures=((1920, 1080),), dtype=torch.float32, batch=2)
    settings, milder = remedy(config, work, available=8 * GIB) or ([], None)
    assert settings == ["dtype bfloat16"]
    assert milder is not None
    assert milder.total <= 8 * GIB
    assert remedy(config, work, available=4 * GIB) is None
    small = plan(config, replace(work, dtype=torch.bfloat16, batch=1), available=PLENTY)
    found = remedy(config, work, available=small.total)
    assert found is not None
    assert found[0] == ["dtype bfloat16", "batch 1"]


def test_a_remedy_may_shrink_pictures() -> None:
    config = find_config("deepseek-vl2-tiny")
    work = Workload(pictures=((1920, 1080),))
    least = plan(config, replace(work, max_tiles=1), available=PLENTY)
    found = remedy(config, work, available=least.total)
    assert found is not None
    assert found[0][0].startswith("max_tiles")
    assert found[1].total <= least.total
    grid = found[1].pictures[0].grid
    assert grid is not None
    assert grid[0] * grid[1] <= int(found[0][0].removeprefix("max_tiles "))


@pytest.mark.parametrize(
    ("name", "workload", "message"),
    [
        ("deepseek-vl2-tiny", {"pictures": ((0, 5),)}, "0x5"),
        ("deepseek-vl-1.3b-chat", {"pictures": ((9, 9),), "max_tiles": 2}, "no tiles"),
        ("deepseek-vl-1.3b-chat", {"pictures": ((9, 9),) * 8}, "4,672 tokens"),
        ("deepseek-vl2-tiny", {"text_tokens": 4000, "new_tokens": 97}, "4,097 of 4,096"),
        ("deepseek-vl2-tiny", {"pictures": ((9, 9),), "max_tiles": 0}, "max_tiles"),
        ("deepseek-vl3", {}, "downloads nothing"),
        ("other/model", {}, "downloads nothing"),
    ],
)
def test_what_cannot_be_planned_is_refused(name: str, workload: dict[str, object], message: str) -> None:
    with pytest.raises(SeekVLError, match=message):
        planned(name, **workload)


@pytest.mark.parametrize("field", ["text_tokens", "new_tokens", "batch"])
def test_a_workload_has_at_least_one_of_each(field: str) -> None:
    with pytest.raises(SeekVLError, match=field):
        Workload(**{field: 0})  # type: ignore[arg-type]


MEASURE = """
import sys, seekvl
from pathlib import Path
folder, width, height = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from PIL import Image
vlm = seekvl.load(folder, device="cpu", dtype="bfloat16")
vlm.ask(Image.new("RGB", (width, height), "red"), "What is this?", max_new_tokens=4)
status = Path("/proc/self/status").read_text()
print(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["deepseek-vl-1.3b-chat", "deepseek-vl-7b-chat", "deepseek-vl2-tiny"])
def test_memory_is_within_a_tenth_of_what_is_measured(name: str, tmp_path: Path) -> None:
    config, folder = find_config(name), tmp_path / "made"
    write_random(CHECKPOINTS[SHORT_NAMES[name]], folder)
    size = (1920, 1080)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), *map(str, size)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1]) * 1024
    found = plan(config, Workload(pictures=(size,), new_tokens=4), available=PLENTY)
    print(f"{name}: planned {found.total / GIB:.2f} GiB, measured {measured / GIB:.2f} GiB")
    assert found.total == pytest.approx(measured, rel=0.1)
