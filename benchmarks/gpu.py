"""What a CUDA device makes of DeepSeek-VL 7B and of DeepSeek-VL2 small and base, with random weights.

The weights are made on the device at the true dimensions: nothing is written, loaded or downloaded.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --models deepseek-vl2-small --batch 1 8 --json
    python benchmarks/gpu.py --models deepseek-vl-7b-chat --peer --quantize int8 --quantize fp8
    SEEKVL_GPU=graphs python benchmarks/gpu.py          # one level of seekvl/engine/gpu/switch.py

Measured are tokens a second of all answers while all grow, each with its share of the floor (bytes of weights
and cache at the rate of a copy, or operations at the rate of products, whichever takes longer), and for one
large picture the seconds to the first token and to the end of a long answer. Quantised weights are counted
with the bytes they take. --peer lets transformers answer with the same weights, which it has for DeepSeek-VL,
after it has found each of seekvl's first tokens the likeliest, or tied.
"""

import argparse
import gc
import json
import statistics
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from seekvl.engine.budget import choose_limits
from seekvl.engine.engine import Engine
from seekvl.engine.plan import plan_pictures
from seekvl.evals.ceilings import Ceilings, measure_ceilings
from seekvl.evals.clock import Clock, device_clock
from seekvl.evals.machine import device_memory, device_name
from seekvl.evals.peers import Transformers, disagreement
from seekvl.evals.random_weights import TOKENIZERS, random_config, random_network
from seekvl.evals.speed_process import PICTURE, picture, question, together
from seekvl.evals.speed_report import decode, works
from seekvl.models.vl2 import VL2Config
from seekvl.presets import CHECKPOINTS, SHORT_NAMES, Preset
from seekvl.processing.encode import Processor
from seekvl.runtime import SeekVLError, require, select_device
from seekvl.vlm import VLM
from seekvl.weights.config import CheckpointConfig
from seekvl.weights.load import layout_map, open_tokenizer
from seekvl.weights.save import config_files
from seekvl.weights.weight_only import GPU_KINDS, gpu_kind, quantize_on_gpu

MODELS = ("deepseek-vl-7b-chat", "deepseek-vl2-small", "deepseek-vl2")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LARGE = (5014, 2004)
"""Width and height of the large picture, px: that of an issue of the official repository."""
LONG = 550
"""Tokens of the answer about it."""
COMPARED = 8
"""Greedy tokens that a peer has to agree with."""
TURNS = 3


@dataclass
class Measured:
    """What one model in one format took."""

    model: str
    format: str
    level: str | None
    prompt_tokens: int
    decode: dict[int, float] = field(default_factory=dict)
    """Tokens a second by the number of answers."""
    share: dict[int, float] = field(default_factory=dict)
    """Of the floor, 0 to 1."""
    peer: dict[int, float] = field(default_factory=dict)
    """Tokens a second of transformers."""
    memory: float = 0.0
    """Most of the device's memory that torch had handed out, GiB."""
    first_token: float = 0.0
    """Seconds from the question about the large picture to the first token."""
    long_answer: float = 0.0
    """Seconds from it to the end of its answer."""
    large_tokens: int = 0
    """Tokens of that prompt."""


def make(preset: Preset, *, device: torch.device) -> tuple[VLM, CheckpointConfig]:
    """Make a model whose answers never end by themselves."""
    config = random_config(preset)
    tiled = isinstance(preset.model, VL2Config)
    processor = Processor(
        open_tokenizer(TOKENIZERS[tiled], config),
        config.image,
        config.template,
        preprocessing="seekvl"
        if tiled
        else "transformers",  # which has these models and sees the same pixels
        max_tokens=config.max_tokens,
    )
    vlm = VLM(random_network(preset, device=device), processor)
    return endless(vlm), config


def endless(vlm: VLM) -> VLM:
    """Let answers of a model be as long as asked for, and as many at once as the largest batch."""
    vlm.tokenizer.eos_id = -1
    limits = choose_limits(vlm.model)
    vlm.engine = Engine(
        vlm.model, vlm.tokenizer, limits=replace(limits, rows=max(limits.rows, BATCHES[-1]), guess=0)
    )
    return vlm


def saved_bytes(model: nn.Module) -> float:
    """Return how many bytes fewer than in its own dtype torchao's weights of a network take."""
    saved = 0.0
    for parameter in model.parameters():
        if type(parameter.data) is not Tensor:  # one of torchao's, whose parts are plain
            parts, _ = parameter.data.__tensor_flatten__()
            saved += parameter.nbytes - sum(getattr(parameter.data, part).nbytes for part in parts)
    return saved


def decode_rates(vlm: VLM, batches: list[int], *, tokens: int, clock: Clock) -> dict[int, float]:
    """Return tokens a second by the number of answers: medians, after a turn that compiles and records."""
    rates: dict[int, float] = {}
    number = 0
    for rows in batches:
        turns = []
        for _ in range(TURNS + 1):
            vlm.engine.forget()
            asked = [question(vlm.processor, number=number + row) for row in range(rows)]
            number += rows
            turns.append(together(vlm, asked, steps=tokens, clock=clock)[0])
        rates[rows] = statistics.median(turns[1:])
    return rates


def shares(
    vlm: VLM, config: CheckpointConfig, rates: dict[int, float], *, tokens: int, prompt: int, found: Ceilings
) -> dict[int, float]:
    """Return which part of its time a step would take at the least."""
    (shown,) = plan_pictures(config, (PICTURE,))
    work = works(
        config.model,
        prompt=prompt,
        views=shown.views,
        tokens=tokens,
        batches=list(rates),
        itemsize=vlm.dtype.itemsize,
    )
    saved, dtype = saved_bytes(vlm.model.language), str(vlm.dtype).removeprefix("torch.")
    parts = {}
    for rows, rate in rates.items():
        one = work[decode(rows)]
        floor, _ = found.seconds(read_bytes=one.read_bytes - saved, operations=one.operations, dtype=dtype)
        parts[rows] = floor * rate / rows
    return parts


def large_picture(vlm: VLM, *, tokens: int, clock: Clock) -> tuple[float, float, int]:
    """Return the seconds to the first token and to the end of an answer about a large picture, and the tokens
    of the prompt; of a second one like it, for the first compiles.
    """
    seconds, prompt = (0.0, 0.0), 0
    for number in range(2):
        asked = question(vlm.processor, number=number)
        asked[0]["content"][0]["image"] = picture(number + 7).resize(LARGE, Image.Resampling.BICUBIC)  # type: ignore[index]  # the message made above
        vlm.engine.forget()
        began = clock()
        pieces = vlm.stream(asked, max_new_tokens=tokens)
        first = next(pieces)
        first_token = clock() - began
        *_, last = first, *pieces
        assert last.completion is not None
        seconds, prompt = (first_token, clock() - began), last.completion.usage.prompt_tokens
    return *seconds, prompt


def transformers_of(vlm: VLM, config: CheckpointConfig, *, clock: Clock) -> Transformers:
    """Give transformers the very weights of a DeepSeek-VL, on its device."""
    transformers = require("transformers", extra="transformers")
    name = str(vlm.dtype).removeprefix("torch.")
    values: dict[str, Any] = dict(config_files(config, TOKENIZERS[False], dtype=name)["config.json"])
    kind = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    default = torch.get_default_dtype()
    torch.set_default_dtype(vlm.dtype)
    try:
        with torch.device(vlm.device):
            model = getattr(transformers, values["architectures"][0])(kind)
    finally:
        torch.set_default_dtype(default)
    state = vlm.model.state_dict()
    published = {
        key: target.of(state[target.parameter]) for key, target in layout_map(config).targets.items()
    }
    model.load_state_dict(published, strict=True, assign=True)
    return Transformers.of(model.eval(), dtype=vlm.dtype, device=vlm.device, clock=clock)


def peer_rates(
    vlm: VLM, config: CheckpointConfig, batches: list[int], *, tokens: int, clock: Clock
) -> dict[int, float]:
    """Return tokens a second of transformers, after it has agreed with seekvl."""
    asked = question(vlm.processor)
    inputs = vlm.processor(asked)
    peer = transformers_of(vlm, config, clock=clock)
    ours, said = vlm.logits(asked)[-1], vlm.chat(asked, max_new_tokens=COMPARED).token_ids
    apart = disagreement(ours, peer.logits(inputs, tokens=said), tokens=said, dtype=vlm.dtype)
    if apart is not None:
        raise SeekVLError(f"seekvl and transformers do not compute the same, so it is not timed: {apart}")
    rates = {}
    for rows in batches:
        turns = []
        for _ in range(2):
            reply = peer.answer(inputs, count=tokens + 1, rows=rows)
            turns.append(rows * tokens / (reply.times[-1] - reply.times[0]))
        rates[rows] = turns[-1]
    return rates


def measure(
    name: str,
    kind: str | None,
    *,
    device: torch.device,
    batches: list[int],
    tokens: int,
    peer: bool,
    long: int,
    found: Ceilings,
) -> Measured:
    """Measure one model in one format."""
    clock = device_clock(device)
    vlm, config = make(CHECKPOINTS[SHORT_NAMES.get(name, name)], device=device)
    if kind is not None:
        quantize_on_gpu(vlm.model, gpu_kind(kind))
    prompt = vlm.processor(question(vlm.processor)).bill.total
    measured = Measured(name, kind or str(vlm.dtype).removeprefix("torch."), vlm.kernels, prompt)
    measured.decode = decode_rates(vlm, batches, tokens=tokens, clock=clock)
    measured.share = shares(vlm, config, measured.decode, tokens=tokens, prompt=prompt, found=found)
    measured.memory = device_memory(device)
    first, whole, total = large_picture(vlm, tokens=long, clock=clock)
    measured.first_token, measured.long_answer, measured.large_tokens = first, whole, total
    if peer and kind is None and not isinstance(config.model, VL2Config):
        measured.peer = peer_rates(vlm, config, batches, tokens=tokens, clock=clock)
    return measured


def table(measured: Measured, *, long: int) -> str:
    """Write what one model took for people."""
    one = measured
    lines = [
        f"{one.model}, {one.format}, level {one.level}: prompt of {one.prompt_tokens:,} tokens, "
        f"{one.memory:.1f} GiB",
        f"  picture of {LARGE[0]} x {LARGE[1]}, {one.large_tokens:,} tokens: first token after "
        f"{one.first_token:.3f} s, answer of {long:,} after {one.long_answer:.2f} s",
    ]
    for rows, rate in one.decode.items():
        line = f"  decode, batch {rows:<3} {rate:>10.1f} tok/s {100 * one.share[rows]:>6.0f} % of the floor"
        if rows in one.peer:
            line += f"   transformers {one.peer[rows]:>8.1f}   {rate / one.peer[rows]:.2f}x"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="published checkpoints by name")
    parser.add_argument("--batch", nargs="+", type=int, default=list(BATCHES), help="answers at once")
    parser.add_argument("--tokens", type=int, default=64, help="steps that are timed")
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the answer about a large picture")
    parser.add_argument(
        "--quantize", action="append", choices=GPU_KINDS, help="also in this format; extra gpu"
    )
    parser.add_argument("--peer", action="store_true", help="transformers beside it, where it has the model")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="one line a model instead of a table")
    options = parser.parse_args()
    device = select_device(options.device)
    found = measure_ceilings(threads=torch.get_num_threads(), device=str(device))
    if not options.json:
        print(
            f"{device_name(device)}, torch {torch.__version__}: copies {found.read / 1e9:,.0f} GB/s, "
            f"multiplies bfloat16 at {found.operations['bfloat16'] / 1e12:,.0f} TFLOP/s"
        )
    for name in options.models:
        for kind in (None, *(options.quantize or ())):
            measured = measure(
                name,
                kind,
                device=device,
                batches=sorted(set(options.batch)),
                tokens=options.tokens,
                peer=options.peer,
                long=options.long,
                found=found,
            )
            print(
                json.dumps(asdict(measured)) if options.json else table(measured, long=options.long),
                flush=True,
            )
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)


if __name__ == "__main__":
    main()
