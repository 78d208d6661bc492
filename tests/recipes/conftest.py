"""One tokenizer a family for the tests of the recipes: learning it takes a second."""

from pathlib import Path

import pytest

from seekvl.processing.template import DEEPSEEK_VL2
from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes import nano_moe
from seekvl.recipes.nano import SPECIALS, TEMPLATE
from seekvl.recipes.nano_words import train_tokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_tokenizer(path, template=TEMPLATE, specials=SPECIALS, samples=300)
    return path


@pytest.fixture(scope="session")
def moe_words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe-words") / "tokenizer.json"
    train_tokenizer(path, template=DEEPSEEK_VL2, specials=nano_moe.SPECIALS, draw=nano_moe.DRAW, samples=600)
    return path


@pytest.fixture(scope="session")
def tokenizer(words: Path) -> Tokenizer:
    return Tokenizer.from_file(words)
