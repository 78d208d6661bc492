"""seekvl's mixture of experts beside a loop over the experts: the same weights and tokens, in one process.

The loop is written here from a description of the official DeepSeek-VL2 code. It stands for what people run
today: one module per expert and a Python loop over them.

    answering   the counts of the tokens go to the host, tokens are sorted by expert, experts without tokens
                are skipped, outputs are put back in order and summed by weight in float32
    training    every token stands k times in a row; an expert takes its rows by a mask, and its outputs go to
                their places by the same mask

Router, shared experts and weights are the same on both sides. The routed experts are computed differently,
and ours answers through the CPU kernels where they were compiled: one layer product by product, the whole
language model in one call a prompt and one a step, as the engine does.

Measured are one layer of DeepSeek-VL2-tiny and its whole language model, both with random weights: prefill,
decoding of one token (of one layer also of a batch of 8), and a training step (forward, and backward into
gradients that start from nothing; of the whole model with head and cross-entropy). Sides alternate, every
figure is the median over the rounds. Nothing is timed before both sides have given the same answers, and one
layer the same gradients.

    python benchmarks/moe.py --rounds 5 --tokens 512 --json
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from sides import OURS, Values, agree, fill, print_figures, take_turns
from torch import Tensor, nn

import seekvl
from seekvl.engine.budget import free_bytes
from seekvl.engine.cache import KVCache
from seekvl.engine.kernels import decoder as kernels
from seekvl.engine.kernels import prompts
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.engine.kernels.compiled import choose_level
from seekvl.evals.machine import Neighbours, processor, wait_until_quiet
from seekvl.models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from seekvl.models.moe import Moe, RouterRecord
from seekvl.presets import VL2_TINY
from seekvl.runtime import torch_generator

PEER = "loop over experts"
SIDES = (OURS, PEER)
DECODED = 32
"""Tokens a layer decodes in a round; each may meet other experts, so weights come from memory."""
BATCH = 8
"""Tokens of a step of batched decoding, and tokens the whole model decodes in a round."""
FIGURES = (
    *("layer_prefill", "layer_decode", "layer_decode_batch", "layer_train"),
    *("model_prefill", "model_decode", "model_train"),
)
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (0.02, 0.05)}
"""Largest difference between the sides, as a share of the norm, of one layer and of the whole model."""
SPARE = 6 * 2**20
"""Bytes for each token that a training step of the whole model needs beside weights and gradients."""


class Expert(nn.Module):
    """One expert as a module of its own, on the memory of the stacks."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Parameter(weight.detach()) for weight in (gate, up, down))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the SwiGLU to x[c, d]."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class ExpertLoop(nn.Module):
    """A `Moe` whose routed experts are computed one by one, in the way the official code does."""

    def __init__(self, moe: Moe) -> None:
        super().__init__()
        self.gate, self.shared = moe.gate, moe.shared
        stacks = moe.experts.gate_proj, moe.experts.up_proj, moe.experts.down_proj
        self.experts = nn.ModuleList(Expert(*matrices) for matrices in zip(*stacks, strict=True))

    def forward(self, x: Tensor, *, record: RouterRecord | None = None, layer: int = 0) -> Tensor:
        """Transform each position of x[b, t, d] alone."""
        routing = self.gate(x)
        run = self.by_mask if torch.is_grad_enabled() else self.by_count
        rows = run(x.flatten(0, 1), routing.experts.flatten(0, 1), routing.weights.flatten(0, 1))
        return rows.view_as(x) if self.shared is None else rows.view_as(x) + self.shared(x)

    def by_count(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Answer for x[n, d] with experts i64[n, k] and weights f32[n, k]."""
        counts = torch.zeros(len(x), len(self.experts), dtype=torch.int64, device=x.device)
        counts = counts.scatter_(1, experts, 1).sum(dim=0).cpu().tolist()
        order = experts.flatten().argsort()
        rows = x[order // experts.shape[1]]  # z d
        parts, start = [], 0
        for expert, count in zip(self.experts, counts, strict=True):
            if count:
                parts.append(expert(rows[start : start + count]))
                start += count
        outputs = torch.empty_like(rows)
        outputs[order] = torch.cat(parts)
        slots = outputs.view(*experts.shape, -1).to(weights.dtype)  # n k d
        return slots.mul_(weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    def by_mask(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Compute the same so that autograd can follow."""
        slots = experts.flatten()
        rows = x.repeat_interleave(experts.shape[1], dim=0)  # z d
        outputs = torch.empty_like(rows)
        for index, expert in enumerate(self.experts):
            mine = slots == index
            outputs[mine] = expert(rows[mine])
        summed = (outputs.view(*experts.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
        return summed.to(x.dtype)

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients of the three stacks; an expert without tokens has zeros."""
        for name in ("gate", "up", "down"):
            weights = [getattr(expert, name) for expert in self.experts]
            yield torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in weights])


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    config = tiny_language(small=args.tiny)
    dtype = getattr(torch, args.dtype)
    neighbours = Neighbours()
    values, notes = measure_layer(config, dtype=dtype, args=args)
    if any(name.startswith("model_") for name in args.figures):
        layers = config.layers if args.layers is None else args.layers
        more, said = measure_model(replace(config, layers=layers), dtype=dtype, args=args)
        values, notes = values | more, notes + said
    report(values, notes=notes, neighbours=neighbours, args=args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over which the median is taken")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of prefill and training step")
    parser.add_argument(
        "--layers", type=int, help="layers of the whole model, the first without experts; default all"
    )
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, default=FIGURES, help="measure these only; default all"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds to wait for an idle machine")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny dimensions: tests the program, not the speed"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    for name, least in (("rounds", 1), ("tokens", DECODED), ("threads", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(args, name)}")
    most = tiny_language(small=args.tiny).layers
    if args.layers is not None and not 2 <= args.layers <= most:
        parser.error(f"--layers must be from 2 to {most}, not {args.layers}")
    return args


def tiny_language(*, small: bool) -> DeepseekV2Config:
    """Return the language model of DeepSeek-VL2-tiny, or one of its kind that runs in no time."""
    config = VL2_TINY.model.language
    assert isinstance(config, DeepseekV2Config)
    assert config.moe is not None
    if not small:
        return config
    moe = replace(config.moe, experts=8, width=32)
    return replace(config, vocab_size=128, width=64, layers=3, heads=2, kv_heads=2, mlp_width=96, moe=moe)


def alternate(name: str, run: Callable[[str], object], *, args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each side; every side runs once before."""
    for side in SIDES:
        run(side)
    wait_until_quiet(seconds=args.quiet)
    runs: dict[str, Callable[[], object]] = {side: partial(run, side) for side in SIDES}
    return take_turns(runs, what=name, rounds=args.rounds)


def measure_layer(
    config: DeepseekV2Config, *, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[Values, list[str]]:
    """Compare and time one layer's mixture of experts."""
    assert config.moe is not None
    with torch.device("meta"):
        moe = Moe(config.width, config.moe).to(dtype)
    fill(moe)
    sides: dict[str, Moe | ExpertLoop] = {"seekvl": moe, PEER: ExpertLoop(moe)}
    generator = torch_generator(0, "benchmark tokens")
    x, grad = torch.randn(2, 1, args.tokens, config.width, generator=generator).to(dtype)

    def train(side: str) -> Tensor:
        switch(sides[side], side)
        forget(*sides.values())
        source = x.clone().requires_grad_()
        out = sides[side](source)
        out.backward(grad)
        assert source.grad is not None
        return source.grad

    @torch.inference_mode()
    def prefill(side: str) -> Tensor:
        switch(sides[side], side)
        return sides[side](x)

    @torch.inference_mode()
    def decode(side: str) -> Tensor:
        switch(sides[side], side)
        return torch.cat([sides[side](x[:, i : i + 1]) for i in range(DECODED)])

    @torch.inference_mode()
    def decode_batch(side: str) -> Tensor:
        switch(sides[side], side)
        return torch.cat([sides[side](rows.transpose(0, 1)) for rows in x[:, :DECODED].split(BATCH, dim=1)])

    answers = (prefill, decode, decode_batch)
    pairs = {run.__name__: (run("seekvl"), run(PEER)) for run in answers}
    gradients = {side: layer_gradients(sides[side], train(side)) for side in SIDES}
    pairs |= {f"gradient of {name}": (g, gradients[PEER][name]) for name, g in gradients["seekvl"].items()}
    text = agree(pairs, what="one layer", tolerance=TOLERANCE[dtype][0])
    del pairs, gradients
    steps = {"layer_decode": DECODED, "layer_decode_batch": DECODED // BATCH}
    tasks = {f"layer_{run.__name__}": run for run in (*answers, train)}
    return time_tasks(tasks, steps=steps, args=args), [text]


def switch(network: nn.Module, side: str) -> None:
    """Let ours answer through the kernels and the peer without; they have modules in common."""
    accelerate(network, level="off" if side == PEER else None)


def time_tasks(
    tasks: dict[str, Callable[[str], object]], *, steps: dict[str, int], args: argparse.Namespace
) -> Values:
    """Return the median seconds of a step of those tasks that were asked for; a task takes a side's name."""
    return {
        name: {
            side: seconds / steps.get(name, 1) for side, seconds in alternate(name, run, args=args).items()
        }
        for name, run in tasks.items()
        if name in args.figures
    }


def forget(*models: nn.Module) -> None:
    """Drop all gradients."""
    for model in models:
        model.zero_grad(set_to_none=True)


def layer_gradients(side: Moe | ExpertLoop, source: Tensor) -> dict[str, Tensor]:
    """Return the gradients of tokens, router and stacks."""
    if isinstance(side, ExpertLoop):
        stacks = list(side.gradients())
    else:
        parameters = side.experts.gate_proj, side.experts.up_proj, side.experts.down_proj
        stacks = [p.grad for p in parameters if p.grad is not None]
    assert side.gate.weight.grad is not None
    named = {"tokens": source, "router": side.gate.weight.grad.clone()}
    return named | dict(zip(("gate", "up", "down"), stacks, strict=True))


def measure_model(
    config: DeepseekV2Config, *, dtype: torch.dtype, args: argparse.Namespace
) -> tuple[Values, list[str]]:
    """Compare and time the language model."""
    with torch.device("meta"):
        model = DeepseekV2(config).to(dtype)
    fill(model)
    ours = [layer.mlp for layer in model.layers]
    peer = [ExpertLoop(mlp) if isinstance(mlp, Moe) else mlp for mlp in ours]
    generator = torch_generator(0, "benchmark prompt")
    ids = torch.randint(0, config.vocab_size, (1, args.tokens + 1), generator=generator)
    cache = KVCache(config, rows=1, device=torch.device("cpu"), dtype=dtype)
    cache.reserve(args.tokens + 1)

    def choose(side: str) -> None:
        for layer, mlp in zip(model.layers, ours if side == "seekvl" else peer, strict=True):
            layer.mlp = mlp
        switch(model, side)

    @torch.inference_mode()
    def read(side: str) -> Tensor:
        choose(side)
        return read_prompt(model, ids[:, :-1], cache=cache, side=side)

    @torch.inference_mode()
    def prefill(side: str) -> Tensor:
        choose(side)
        return prefill_prompt(model, ids[:, :-1], cache=cache, side=side)

    @torch.inference_mode()
    def decode(side: str) -> Tensor:
        choose(side)
        return torch.cat(
            [decode_token(model, token, cache=cache, side=side) for token in ids[0, :BATCH].tolist()]
        )

    def train(side: str) -> None:
        choose(side)
        forget(model, *ours, *peer)
        logits = model.lm_head(model(model.embed_tokens(ids[:, :-1])))
        F.cross_entropy(logits.flatten(0, 1), ids[0, 1:]).backward()

    tasks: dict[str, Callable[[str], Tensor]] = {"hidden states": read, "prefill": prefill, "decode": decode}
    pairs = {name: (run("seekvl"), run(PEER)) for name, run in tasks.items()}
    notes = [agree(pairs, what=f"{config.layers} layers", tolerance=TOLERANCE[dtype][1])]
    timed: dict[str, Callable[[str], object]] = {"model_prefill": prefill, "model_decode": decode}
    weights = sum(p.nbytes for p in model.parameters())
    free, spare = free_bytes(torch.device("cpu")), SPARE * args.tokens
    if free < weights + spare:
        notes.append(
            f"training step of the whole model not measured: {weights / 2**30:.1f} GiB of gradients and "
            f"{spare / 2**30:.1f} GiB more do not fit into {free / 2**30:.1f} GiB; lower --layers"
        )
    else:
        timed["model_train"] = train
    return time_tasks(timed, steps={"model_decode": BATCH}, args=args), notes


def read_prompt(model: DeepseekV2, ids: Tensor, *, cache: KVCache, side: str) -> Tensor:
    """Return the hidden states f32[t, d] of a prompt i64[1, t], which the cache holds then and nothing else.

    Ours takes the way of the engine: one call into the kernels where there are some.
    """
    cache.truncate(0, 0)
    embeds, row = model.embed_tokens(ids), cache.row(0)
    if side == "seekvl":
        keys, values = cache.buffers
        hidden = prompts.prompt_hidden(model, embeds[0], slot=0, start=0, keys=keys, values=values)
        if hidden is not None:
            row.advance(ids.shape[1])
            return hidden
    hidden = model(embeds, cache=row)[0]
    row.advance(ids.shape[1])
    return hidden.float()


def prefill_prompt(model: DeepseekV2, ids: Tensor, *, cache: KVCache, side: str) -> Tensor:
    """Return the logits f32[v] after a prompt i64[1, t], which the cache holds then and nothing else.

    The engine asks for no more, so ours computes the last layer's outputs for the last token only.
    """
    if side == "seekvl":
        cache.truncate(0, 0)
        (keys, values), embeds = cache.buffers, model.embed_tokens(ids)
        logits = prompts.prompt_logits(model, embeds[0], slot=0, start=0, keys=keys, values=values)
        if logits is not None:
            cache.row(0).advance(ids.shape[1])
            return logits
    hidden = read_prompt(model, ids, cache=cache, side=side)
    return model.lm_head(hidden[-1].to(model.lm_head.weight.dtype)).float()


def decode_token(model: DeepseekV2, token: int, *, cache: KVCache, side: str) -> Tensor:
    """Return the logits f32[1, v] after one more token, which the cache forgets again.

    Ours takes the way of the engine: one call into the kernels where there are some.
    """
    if side == "seekvl":
        keys, values = cache.buffers
        logits = kernels.decode(model, [token], slots=[0], positions=cache.lengths, keys=keys, values=values)
        if logits is not None:
            return logits
    embeds = model.embed_tokens(torch.tensor([[token]]))
    at = cache.at([0])
    hidden = model(embeds, positions=at.positions(), cache=at)
    return model.lm_head(hidden[:, 0]).float()


def report(values: Values, *, notes: list[str], neighbours: Neighbours, args: argparse.Namespace) -> None:
    """Print the table, and with --json its line."""
    name = "tiny dimensions" if args.tiny else "DeepSeek-VL2-tiny"
    print(f"{name}, random {args.dtype} weights, {args.tokens} tokens, {args.threads} threads")
    print(f"seekvl {seekvl.__version__}, torch {torch.__version__}, {processor()}")
    print(f"CPU kernels of seekvl: {choose_level() or 'none'}")
    print("\n".join(notes))
    figures = print_figures(values, peer=PEER, unit="ms", neighbours=neighbours, args=args)
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
