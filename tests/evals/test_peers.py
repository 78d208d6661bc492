import pytest
import torch

from seekvl.evals.peers import TOLERANCE, disagreement

LOGITS = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
TOKENS = LOGITS.argmax(dim=1).tolist()


def test_equal_answers_agree() -> None:
    assert disagreement(LOGITS[0], LOGITS, tokens=TOKENS, dtype=torch.float32) is None


def test_a_tie_is_no_disagreement() -> None:
    tied = LOGITS.clone()
    tied[1, 7] = tied[1].max() + 1e-4
    assert disagreement(LOGITS[0], tied, tokens=TOKENS, dtype=torch.float32) is None


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_other_logits_and_other_tokens_do_not_agree(dtype: torch.dtype) -> None:
    said = disagreement(LOGITS[0] + 3 * LOGITS.std(), LOGITS, tokens=TOKENS, dtype=dtype)
    assert said is not None
    assert "logits after the prompt differ" in said
    wrong = [*TOKENS[:2], int(LOGITS[2].argmin())]
    said = disagreement(LOGITS[0], LOGITS, tokens=wrong, dtype=dtype)
    assert said is not None
    assert said.startswith("token 3 of 3")


def test_numbers_that_are_none_do_not_agree() -> None:
    broken = torch.full((50,), float("nan"))
    assert disagreement(broken, LOGITS, tokens=TOKENS, dtype=torch.bfloat16) is not None
