"""seekvl's vision towers beside those of transformers: the same random weights and pictures, in one process.

    siglip       SigLIP-L of DeepSeek-VL, one picture of 384 px
    sam          SAM-B of DeepSeek-VL-7B with side branch and downsampling, one picture of 1024 px
    so400m       SigLIP-SO400M of DeepSeek-VL2, one tile of 384 px
    so400m_10    the same, ten tiles at once

transformers has no DeepSeek-VL2; its SigLIP with the dimensions of SO400M stands for one. Both programs use
the same memory for the weights. Sides alternate, every figure is the median over the rounds. No figure is
printed unless both sides have given the same features.

    python benchmarks/vision.py --rounds 5 --json
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from sides import FLOPS, OURS, Values, agree, fill, print_figures, take_turns
from torch import Tensor

import seekvl
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.engine.kernels.towers import TOWERS, tower_level
from seekvl.evals.clock import Clock
from seekvl.evals.machine import Neighbours, processor, wait_until_quiet
from seekvl.models.adaptor import AdaptorConfig
from seekvl.models.cost import sam_flops, siglip_flops
from seekvl.models.hybrid import Hybrid, HybridConfig
from seekvl.models.llama import LlamaConfig
from seekvl.models.siglip import Siglip
from seekvl.models.vl import VLConfig
from seekvl.models.vl2 import on_meta
from seekvl.presets import HALF, SIGLIP_SO400M, VL_7B
from seekvl.runtime import torch_generator
from seekvl.weights.transformers_config import write_transformers
from seekvl.weights.transformers_layout import transformers_map

if TYPE_CHECKING:
    from transformers import DeepseekVLForConditionalGeneration, DeepseekVLHybridForConditionalGeneration

PEER = "transformers"
SIDES = (OURS, PEER)
FIGURES = ("siglip", "sam", "so400m", "so400m_10")
TILES = 10
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference between the sides' features, as a share of their norm."""
LANGUAGE = LlamaConfig(vocab_size=8, width=64, layers=1, heads=1, kv_heads=1, mlp_width=8)
"""What the peer's classes want beside a tower; it never runs."""

Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One figure: both sides of it, what they see, and its arithmetic."""

    name: str
    runs: dict[str, Run]
    """Side -> function from pixels to features f[n, t, c]."""
    pixels: Tensor
    """Normalised pixels f[n, 3, S, S]."""
    flops: int
    """Operations, windows without their padding."""
    level: str | None
    """Of the kernels that compute our side in one call; None where torch does."""


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    neighbours = Neighbours()
    notes, values = [], {}
    with torch.inference_mode():
        for task in tasks(args, dtype=dtype):
            seconds, features = alternate(task, args=args)
            pair = features["seekvl"], features[PEER]
            notes.append(agree({"features": pair}, what=task.name, tolerance=TOLERANCE[dtype]))
            notes.append(f"{task.name}: blocks computed by {task.level or 'torch'}")
            values[task.name] = seconds | {FLOPS: float(task.flops)}
    report(values, notes=notes, neighbours=neighbours, args=args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds over which the median is taken")
    parser.add_argument(
        "--figures", nargs="+", choices=FIGURES, default=FIGURES, help="measure these only; default all"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds to wait for an idle machine")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of one thread: for a machine that is never idle"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny dimensions: tests the program, not the speed"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.cpu_time and args.threads != 1:
        parser.error(f"--cpu-time needs --threads 1, not {args.threads}: it adds up what threads do at once")
    return args


def tasks(args: argparse.Namespace, *, dtype: torch.dtype) -> Iterator[Task]:
    """Yield what was asked for; a pair of towers is in memory only as long as its figures are measured."""
    if {"siglip", "sam"} & set(args.figures):
        yield from hybrid_tasks(args, dtype=dtype)
    if {"so400m", "so400m_10"} & set(args.figures):
        yield from tile_tasks(args, dtype=dtype)


def hybrid_tasks(args: argparse.Namespace, *, dtype: torch.dtype) -> Iterator[Task]:
    """Yield the towers of DeepSeek-VL-7B; its SigLIP is that of the 1.3B."""
    vision = VL_7B.model.vision
    assert isinstance(vision, HybridConfig)
    if args.tiny:
        high = replace(vision.high, image_size=128, width=32, heads=2, mlp_width=64, resize_side=16)
        high = replace(high, layers=3, global_layers=(2,), window=5)
        low = replace(vision.low, image_size=64, width=32, layers=2, heads=2, mlp_width=64)
        high = replace(high, neck_channels=8, downsample_channels=(16, 32))
        vision = HybridConfig(high=high, low=low)
    tower, peer = towers(vision, dtype=dtype)
    assert isinstance(tower, Hybrid)
    model: Any = peer.model  # transformers types its modules as tensors, too
    if "siglip" in args.figures:
        yield Task(
            name="siglip",
            runs={
                "seekvl": lambda x: tower.low(x, normalized=True),
                PEER: lambda x: model.get_low_res_image_features(x).last_hidden_state,
            },
            pixels=pictures(1, vision.low.image_size, dtype=dtype),
            flops=siglip_flops(vision.low),
            level=tower_level(tower.low),
        )
    if "sam" in args.figures:
        yield Task(
            name="sam",
            runs={
                "seekvl": lambda x: tower.high(x, normalized=True),
                PEER: lambda x: model.get_high_res_image_features(x).last_hidden_state,
            },
            pixels=pictures(1, vision.high.image_size, dtype=dtype),
            flops=sam_flops(vision.high),
            level=tower_level(tower.high),
        )


def tile_tasks(args: argparse.Namespace, *, dtype: torch.dtype) -> Iterator[Task]:
    """Yield the tower of DeepSeek-VL2 with one tile and with ten."""
    vision = replace(SIGLIP_SO400M, pixel_mean=HALF, pixel_std=HALF)
    if args.tiny:
        vision = replace(vision, image_size=64, width=32, layers=2, heads=2, mlp_width=64)
    tower, peer = towers(vision, dtype=dtype)
    assert isinstance(tower, Siglip)
    model: Any = peer.model
    runs: dict[str, Run] = {
        "seekvl": lambda x: tower(x, normalized=True),
        PEER: lambda x: model.vision_model(x).last_hidden_state,
    }
    for name, count in (("so400m", 1), ("so400m_10", TILES)):
        if name in args.figures:
            tiles = pictures(count, vision.image_size, dtype=dtype)
            flops = siglip_flops(vision, pictures=count)
            yield Task(name=name, runs=runs, pixels=tiles, flops=flops, level=tower_level(tower))


Towers = tuple[
    Siglip | Hybrid, "DeepseekVLForConditionalGeneration | DeepseekVLHybridForConditionalGeneration"
]


def towers(vision: Any, *, dtype: torch.dtype) -> Towers:
    """Return our tower of random weights, and the peer's model that holds the same weights."""
    import transformers
    from transformers.initialization import no_init_weights

    low = vision.low if isinstance(vision, HybridConfig) else vision
    hybrid = isinstance(vision, HybridConfig)
    kind = "low_high_hybrid_split_mlp_gelu" if hybrid else "mlp_gelu"
    adaptor = AdaptorConfig(kind=kind, input_width=low.width, width=LANGUAGE.width)  # type: ignore[arg-type]
    config = VLConfig(vision=vision, adaptor=adaptor, language=LANGUAGE)
    ours = on_meta(config).to(dtype).requires_grad_(False)
    fill(ours)
    state = ours.state_dict()
    published = {
        key: target.of(state[target.parameter]) for key, target in transformers_map(config).targets.items()
    }
    values = write_transformers(config, dtype=str(dtype).split(".")[1], image_id=7, bos_id=0, eos_id=1)
    family = "DeepseekVLHybrid" if hybrid else "DeepseekVL"
    peer_config = getattr(transformers, f"{family}Config")(**values)
    with no_init_weights():
        peer = getattr(transformers, f"{family}ForConditionalGeneration")(peer_config).to(dtype).eval()
    peer.load_state_dict(published, assign=True)
    accelerate(ours.vision, kernels=TOWERS)
    return ours.vision, peer


def pictures(count: int, side: int, *, dtype: torch.dtype) -> Tensor:
    """Return normalised pixels f[n, 3, S, S]."""
    pixels = torch.rand(count, 3, side, side, generator=torch_generator(0, "benchmark pictures"))
    return (pixels * 2 - 1).to(dtype)


def alternate(task: Task, *, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the median seconds of each side, and its features; both see one picture before."""
    clock: Clock = time.process_time if args.cpu_time else time.perf_counter
    features = {side: task.runs[side](task.pixels[:1]) for side in SIDES}

    def look(side: str) -> None:
        """Keep what a side makes of the picture."""
        features[side] = task.runs[side](task.pixels)

    wait_until_quiet(seconds=args.quiet)
    runs: dict[str, Callable[[], object]] = {side: partial(look, side) for side in SIDES}
    return take_turns(runs, what=task.name, rounds=args.rounds, clock=clock), features


def report(values: Values, *, notes: list[str], neighbours: Neighbours, args: argparse.Namespace) -> None:
    """Print the table, and with --json its line."""
    import transformers

    name = "tiny dimensions" if args.tiny else "true dimensions"
    clock = "CPU time of 1 thread" if args.cpu_time else f"{args.threads} threads"
    print(f"vision towers, {name}, random {args.dtype} weights, {clock}")
    print(
        f"seekvl {seekvl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{processor()}"
    )
    print("\n".join(notes))
    figures = print_figures(values, peer=PEER, unit="s", neighbours=neighbours, args=args)
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
