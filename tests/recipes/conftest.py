"""One tokenizer for the tests of the recipes: learning it takes a second."""

from pathlib import Path

import pytest

from seekvl.processing.tokenizer import Tokenizer
from seekvl.recipes.nano import TEMPLATE
from seekvl.recipes.nano_words import train_tokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    train_tokenizer(path, template=TEMPLATE, samples=300)
    return path


@pytest.fixture(scope="session")
def tokenizer(words: Path) -> Tokenizer:
    return Tokenizer.from_file(words)
