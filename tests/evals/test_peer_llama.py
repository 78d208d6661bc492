import time
from pathlib import Path

import pytest
import torch

from seekvl.evals.gguf import write_gguf
from seekvl.evals.peer_llama import LlamaCpp
from seekvl.evals.peers import disagreement
from seekvl.models.llama import Llama, LlamaConfig
from seekvl.models.quantized import KINDS, Kind

WITHOUT = "the extra llama is not installed: llama.cpp compiles for minutes"
pytest.importorskip("gguf", reason=WITHOUT)
llama_cpp = pytest.importorskip("llama_cpp", reason=WITHOUT)

CONFIG = LlamaConfig(vocab_size=300, width=128, layers=3, heads=4, kv_heads=2, mlp_width=160)
PROMPT, COUNT = list(range(5, 300, 11)), 6


@pytest.fixture(scope="module")
def network() -> Llama:
    made = Llama(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in made.requires_grad_(False).named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        else:
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return made.bfloat16().eval()


def peer(network: Llama, folder: Path, *, kind: Kind | None = None) -> LlamaCpp:
    write_gguf(network, folder / "model.gguf", kind=kind)
    return LlamaCpp(folder / "model.gguf", positions=len(PROMPT) + COUNT, threads=1, clock=time.perf_counter)


def logits(network: Llama, tokens: list[int]) -> torch.Tensor:
    """Ours, f32[t, v], of the same weights in float32."""
    wide = Llama(CONFIG)
    wide.load_state_dict(network.state_dict())
    with torch.inference_mode():
        found: torch.Tensor = wide.lm_head(wide(wide.embed_tokens(torch.tensor(tokens)[None])))[0]
    return found


def test_answers_and_logits_are_ours(network: Llama, tmp_path: Path) -> None:
    other = peer(network, tmp_path)
    assert other.load > 0
    reply = other.answer(PROMPT, count=COUNT)
    assert reply.tokens == other.answer(PROMPT, count=COUNT).tokens, "a second question begins anew"
    assert len(reply.tokens) == len(reply.times) == COUNT
    assert 0 < reply.times[0] < reply.times[-1]
    ours = logits(network, PROMPT + reply.tokens)[len(PROMPT) - 1 : -1]
    theirs = other.logits(PROMPT, tokens=reply.tokens)
    assert float((ours - theirs).abs().max()) < 0.02 * float(ours.std()), "float16 inputs and cache"
    assert ours.argmax(dim=1).tolist() == reply.tokens
    assert disagreement(ours[0], theirs, tokens=reply.tokens, dtype=torch.bfloat16) is None


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_are_near(network: Llama, kind: Kind, tmp_path: Path) -> None:
    ours = logits(network, PROMPT)[-1]
    theirs = peer(network, tmp_path, kind=kind).logits(PROMPT, tokens=[1])[0]
    apart = float((ours - theirs).norm() / ours.norm())
    assert 0 < apart < {"int8": 0.1, "int4": 0.7}[kind], "numbers of no relation are 1.4 apart"


def test_the_clock_sees_what_llama_cpp_counts_itself(network: Llama, tmp_path: Path) -> None:
    other = peer(network, tmp_path)
    other.answer(PROMPT, count=1)
    llama_cpp.llama_perf_context_reset(other._model.ctx)
    reply = other.answer(PROMPT, count=COUNT)
    own = llama_cpp.llama_perf_context(other._model.ctx)
    assert (own.n_p_eval, own.n_eval) == (len(PROMPT), COUNT - 1)
    assert 0 < own.t_p_eval_ms / 1e3 <= reply.times[0]
    assert 0 < own.t_eval_ms / 1e3 <= reply.times[-1] - reply.times[0]
