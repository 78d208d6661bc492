from collections.abc import Mapping, Sequence

import pytest
import torch

from seekvl.engine.runner import Runner
from seekvl.evals.speed_process import Job, measure_seekvl


def test_every_token_takes_a_step_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # endless answers repeat themselves, and tokens that were guessed right would look like steps without time
    fed = list[int]()
    decode = Runner.decode

    def watched(
        self: Runner, slots: Sequence[int], tokens: Sequence[int], *, held: Mapping[int, int]
    ) -> torch.Tensor:
        fed.append(len(tokens))
        return decode(self, slots, tokens, held=held)

    monkeypatch.setattr(Runner, "decode", watched)
    job = Job(
        side="seekvl",
        model="seekvl-nano",
        dtype="float32",
        threads=1,
        batches=(1,),
        device="cpu",
        tokens=40,
    )
    found = measure_seekvl(job)
    assert set(fed) == {1}
    assert len(fed) % 39 == 0, "the first token is that of the prompt"
    assert found.decode.keys() == found.memory.keys() == {"1"}
    assert found.load < found.first_token
