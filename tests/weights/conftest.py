import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Copy a golden checkpoint, without its cases, to where it may be broken."""

    def copied(name: str) -> Path:
        folder = tmp_path / name.rpartition("/")[2]
        folder.mkdir()
        for path in (GOLDEN / name).iterdir():
            if path.suffix in (".json", ".safetensors") and not path.name.startswith("cases"):
                shutil.copyfile(path, folder / path.name)
        return folder

    return copied


@pytest.fixture
def edit() -> Callable[..., None]:
    """Change a JSON file: edit(path, "a.b", value) sets, edit(path, "a.b") removes."""
    removed = object()

    def edited(path: Path, where: str, value: object = removed) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        *parents, last = where.split(".")
        place = content
        for name in parents:
            place = place[name]
        if value is removed:
            del place[last]
        else:
            place[last] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return edited
