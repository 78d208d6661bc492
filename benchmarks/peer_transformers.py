"""seekvl beside transformers: the same DeepSeek-VL-1.3B weights, picture and prompt, each in its own process.

The checkpoint has the true dimensions and random weights, so nothing is downloaded. Processes of the two
programs alternate; every figure is the median over the rounds. Before anything is timed both have to show
that they compute the same: equal greedy tokens, or a first difference between two tokens that are as good as
tied. With --quantize seekvl is timed with whole numbers of eight or four bits, written once from the same
weights, beside transformers in bfloat16; what is compared before is bfloat16 on both sides.

    python benchmarks/peer_transformers.py --rounds 3 --json
    python benchmarks/peer_transformers.py --quantize int8
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from seekvl.evals.clock import Clock, watch
from seekvl.evals.machine import Neighbours, fill_page_cache, peak_memory, processor, wait_until_quiet

if TYPE_CHECKING:
    import torch

    from seekvl.engine.sampler import Peak, Sampler
    from seekvl.presets import Preset

PEER = "transformers"
TEXT_TOKENS = 54
COMPARED = 8
"""Tokens whose logits are compared."""
TOLERANCE = 0.25
"""Largest difference of two logits that bfloat16 explains, in standard deviations of the logits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    unit: str
    higher_is_better: bool = False


FIGURES = (
    Figure(name="load", unit="s"),
    Figure(name="first_token", unit="s"),
    Figure(name="memory", unit="GiB"),
    Figure(name="vision", unit="s"),
    Figure(name="prefill", unit="s"),
    Figure(name="decode", unit="tok/s", higher_is_better=True),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one process measured."""

    load: float
    """Seconds from the call to a model that can answer; libraries are imported, the file is in the page
    cache.
    """
    first_token: float
    """Seconds from the call of load to the first token of the first answer: what is put off while loading,
    and the kernels made for new shapes, are in it.
    """
    memory: float
    """Largest resident memory of the whole process, GiB."""
    vision: float
    """Seconds for the picture: tower and adaptor."""
    prefill: float
    """Seconds from the picture's features to the first token."""
    decode: float
    """Tokens per second after the first: one over the median step."""
    neighbours: float
    """Cores that other processes kept busy meanwhile."""
    tokens: list[int]
    """First tokens of the greedy answer."""


def main() -> None:
    args = parse()
    if args.worker is not None:
        print(json.dumps(asdict(work(args))))
        return
    from seekvl.evals.random_weights import quantise_beside

    with tempfile.TemporaryDirectory(prefix="seekvl-bench-") as scratch:
        folder = args.folder or Path(scratch) / "checkpoint"
        make_checkpoint(folder, tiny=args.tiny)
        folders = {"seekvl": folder, PEER: folder}
        files = {name: Path(scratch) / f"{name}.safetensors" for name in ("plain", *folders)}
        plain = None
        if args.quantize is not None:
            print(f"weights in {args.quantize}", file=sys.stderr)
            folders["seekvl"] = quantise_beside(folder, args.quantize, dtype="bfloat16")
            print("to be compared: seekvl in bfloat16", file=sys.stderr)
            plain = run_side("seekvl", folder, logits=files["plain"], args=args)
        runs: dict[str, list[Measured]] = {"seekvl": [], PEER: []}
        for number in range(args.rounds):
            for side in sorted(runs, reverse=bool(number % 2)):  # who goes first changes every round
                print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
                runs[side].append(run_side(side, folders[side], logits=files[side], args=args))
                print(f"  {shown(runs[side][-1])}", file=sys.stderr)
        ours = (plain or runs["seekvl"][-1], files["seekvl" if plain is None else "plain"])
        agreement = compare(ours, (runs[PEER][-1], files[PEER]))
    report(runs, agreement=agreement, args=args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here and reuse it (4 GB)")
    parser.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="time seekvl in this format; it is kept beside --folder, as FOLDER-int8",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each program")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to decode")
    parser.add_argument("--rounds", type=int, default=3, help="processes per program")
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds to wait for an idle machine")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds of one thread: for a machine that is never idle"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="tiny dimensions: tests the program, not the speed"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--worker", choices=("seekvl", PEER), help=argparse.SUPPRESS)
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, least in (("threads", 1), ("tokens", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(args, name)}")
    if args.cpu_time and args.threads != 1:
        parser.error(f"--cpu-time needs --threads 1, not {args.threads}: it adds up what threads do at once")
    return args


def preset(*, tiny: bool) -> "Preset":
    """Return DeepSeek-VL 1.3B, or a model of its kind that runs in no time."""
    from seekvl.models.adaptor import AdaptorConfig
    from seekvl.models.llama import LlamaConfig
    from seekvl.models.vl import VLConfig
    from seekvl.presets import SIGLIP_LARGE, VL_1B

    if not tiny:
        return VL_1B
    model = VLConfig(
        vision=replace(SIGLIP_LARGE, image_size=64, width=32, layers=2, heads=2, mlp_width=64),
        adaptor=AdaptorConfig(kind="mlp_gelu", input_width=32, width=64),
        language=LlamaConfig(vocab_size=4096, width=64, layers=2, heads=4, kv_heads=4, mlp_width=128),
    )
    return replace(VL_1B, model=model, image=replace(VL_1B.image, image_size=64, patch_slots_side=4))


def make_checkpoint(folder: Path, *, tiny: bool) -> None:
    """Write random bfloat16 weights in the transformers layout, unless the folder holds them already."""
    from seekvl.evals.random_weights import write_random

    if not (folder / "config.json").exists():
        print(f"writing random weights to {folder}", file=sys.stderr)
        write_random(preset(tiny=tiny), folder)


def run_side(side: str, folder: Path, *, logits: Path, args: argparse.Namespace) -> Measured:
    """Measure one program in a fresh process, with the weights in the page cache."""
    fill_page_cache(folder)
    wait_until_quiet(seconds=args.quiet)
    command = [sys.executable, __file__, "--worker", side, "--folder", str(folder)]
    command += ["--logits", str(logits)]
    command += ["--threads", str(args.threads), "--tokens", str(args.tokens)]
    if args.cpu_time:
        command.append("--cpu-time")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"the process of {side} failed with exit code {done.returncode}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def work(args: argparse.Namespace) -> Measured:
    """Load, answer once to warm up and for the comparison, then measure an answer."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    start = start_seekvl if args.worker == "seekvl" else start_transformers
    load, answer = start(args.folder, clock=time.process_time if args.cpu_time else time.perf_counter)
    seen: list[torch.Tensor] = []
    tokens, began, _, times = answer(COMPARED, lambda logits: seen.append(logits.flatten().float().clone()))
    first_token = load + times[0] - began
    save_file({"logits": torch.stack(seen)}, args.logits)
    _, began, vision, times = answer(args.tokens + 1, lambda _: None)
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    return Measured(
        load=load,
        first_token=first_token,
        memory=peak_memory(),
        vision=vision,
        prefill=times[0] - began - vision,
        decode=1 / statistics.median(steps),
        neighbours=neighbours.cores(),
        tokens=tokens,
    )


Answered = tuple[list[int], float, float, list[float]]
"""Tokens, when the work began, seconds of vision, when each token was there."""
Note = Callable[["torch.Tensor"], None]
"""Is shown the logits before each token."""
Started = tuple[float, Callable[[int, Note], Answered]]
"""Seconds of loading, a function that answers with so many tokens."""


def prompt(image_id: int, slots: int) -> "torch.Tensor":
    """Return the ids i64[t] both programs are given: words, the picture's slots, words."""
    import torch

    from seekvl.runtime import torch_generator

    words = torch.randint(0, 600, (TEXT_TOKENS,), generator=torch_generator(0, "benchmark prompt"))
    return torch.cat((words[:20], torch.full((slots,), image_id), words[20:]))


def picture(side: int) -> "torch.Tensor":
    """Return normalised pixels f32[1, 3, S, S] of a smooth drawing."""
    import torch

    ramp = torch.linspace(-1, 1, side)
    return torch.stack((ramp.expand(side, side), ramp[:, None].expand(side, side), ramp.outer(ramp)))[None]


def start_seekvl(folder: Path, *, clock: Clock) -> Started:
    """Load seekvl and return how to ask it."""
    from seekvl.engine import engine as room
    from seekvl.engine.generate import generate
    from seekvl.engine.kernels.accelerate import PACKED, accelerate
    from seekvl.engine.kernels.towers import TOWERS
    from seekvl.engine.request import Request, SamplingParams
    from seekvl.processing.encode import ModelInput, TokenBill
    from seekvl.weights.load import load_checkpoint

    began = clock()
    checkpoint = load_checkpoint(folder, device="cpu", dtype="bfloat16")
    accelerate(checkpoint.model.language)
    accelerate(checkpoint.model.vision, kernels=TOWERS)
    accelerate(checkpoint.model.adaptor, kernels=PACKED)
    load = clock() - began
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    image_id, slots, side = tokenizer.image_id, model.config.visual_tokens, model.config.image_size
    ids = prompt(image_id, slots)
    inputs = ModelInput(
        input_ids=ids,
        image_mask=ids == image_id,
        pixels=picture(side),
        low_pixels=None,
        normalized=True,
        loss_weights=None,
        picture_sizes=((side, side),),
        prompt="",
        bill=TokenBill(text_tokens=TEXT_TOKENS, image_tokens=(slots,), total=len(ids), limit=4096),
    )

    vision, choose = watch(model.vision, model.adaptor, clock=clock), room.choose

    def answer(count: int, note: Note) -> Answered:
        request = Request(inputs=inputs, params=SamplingParams(max_new_tokens=count), end_id=-1)

        def choose_noted(logits: "torch.Tensor", sampler: "Sampler", *, peak: "Peak | None" = None) -> int:
            note(logits)
            return choose(logits, sampler, peak=peak)

        tokens, times = [], []
        with patch.object(room, "choose", choose_noted):  # a hook would keep the network from the kernels
            began = clock()
            for _, piece in generate(model, tokenizer, requests=[request]):
                times.append(clock())
                tokens.append(piece.token_id)
        return tokens, began, vision(), times

    return load, answer


def start_transformers(folder: Path, *, clock: Clock) -> Started:
    """Load transformers and return how to ask it."""
    import torch
    from transformers import DeepseekVLForConditionalGeneration, LogitsProcessor, LogitsProcessorList

    began = clock()
    model = DeepseekVLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    load = clock() - began
    config = model.config
    slots = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    ids = prompt(config.image_token_id, slots)[None]
    pixels = picture(config.vision_config.image_size).to(torch.bfloat16)
    vision = watch(model.model.vision_model, model.model.aligner, clock=clock)

    class Stopwatch(LogitsProcessor):
        """Notes when the logits of each token are there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            self.times.append(clock())
            return scores

    def answer(count: int, note: Note) -> Answered:
        stopwatch = Stopwatch()
        began = clock()
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                pixel_values=pixels,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
                do_sample=False,
                logits_processor=LogitsProcessorList([stopwatch]),
                return_dict_in_generate=True,
                output_logits=True,  # as the head gives them; processors have forbidden the end token
            )
        for logits in out.logits:
            note(logits)
        return out.sequences[0, ids.shape[1] :].tolist(), began, vision(), stopwatch.times

    return load, answer


def compare(seekvl: tuple[Measured, Path], peer: tuple[Measured, Path]) -> str:
    """Say how well the programs agree, each with its file of logits; stop where they do not compute the
    same.
    """
    from safetensors.torch import load_file

    ours, theirs = (load_file(file)["logits"] for _, file in (seekvl, peer))
    tokens, others = (measured.tokens for measured, _ in (seekvl, peer))
    same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), len(tokens))
    rows = min(same + 1, len(tokens))  # logits after a different token answer another question
    largest = float((ours[:rows] - theirs[:rows]).abs().max() / theirs[:rows].std())
    text = f"logits differ by at most {largest:.3f} standard deviations; "
    if not largest <= TOLERANCE:
        sys.exit(f"{text}more than the {TOLERANCE} that bfloat16 explains: not the same computation")
    if same == len(tokens):
        return f"{text}first {same} greedy tokens equal"
    margin = float(abs(ours[same, tokens[same]] - ours[same, others[same]]) / theirs[:rows].std())
    if margin > 2 * largest:
        sys.exit(f"{text}token {same + 1} differs with a margin of {margin:.3f}: not the same computation")
    return f"{text}first {same} greedy tokens equal, then a tie (margin {margin:.3f})"


def report(runs: dict[str, list[Measured]], *, agreement: str, args: argparse.Namespace) -> None:
    """Print the table, and with --json its line."""
    import torch
    import transformers

    import seekvl

    name = "tiny dimensions" if args.tiny else "DeepSeek-VL-1.3B"
    clock = "CPU time of 1 thread" if args.cpu_time else f"{args.threads} threads"
    ours_in = "" if args.quantize is None else f" (seekvl's in {args.quantize})"
    print(f"{name}, random bfloat16 weights{ours_in}, 1 picture and {TEXT_TOKENS} text tokens, {clock}")
    print(
        f"seekvl {seekvl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{processor()}"
    )
    print(f"median of {args.rounds} processes each, {args.tokens} tokens decoded; {agreement}")
    busy = [measured.neighbours for side in runs.values() for measured in side]
    print(f"cores busy with other work: {statistics.mean(busy):.2f} on average, {max(busy):.2f} at most\n")
    print(f"{'figure':<26}{'seekvl':>10}{PEER:>15}{'seekvl/peer':>14}")
    values = {}
    for figure in FIGURES:
        ours, peer = (
            statistics.median(getattr(measured, figure.name) for measured in runs[side])
            for side in ("seekvl", PEER)
        )
        better = "higher" if figure.higher_is_better else "lower"
        label = f"{figure.name}, {figure.unit} ({better})"
        print(f"{label:<26}{ours:>10.3f}{peer:>15.3f}{ours / peer:>14.2f}")
        values[figure.name] = {
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer,
            "unit": figure.unit,
            "peer_name": PEER,
        }
    if args.json:
        print(json.dumps(values))


def shown(measured: Measured) -> str:
    """Return what one process measured, in a line."""
    figures = [f"{figure.name} {getattr(measured, figure.name):.3f} {figure.unit}" for figure in FIGURES]
    return f"{', '.join(figures)}; {measured.neighbours:.2f} cores busy with other work"


if __name__ == "__main__":
    main()
