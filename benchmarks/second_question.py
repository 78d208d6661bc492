"""A second question about a picture beside the first: seconds to the first token, in one engine.

DeepSeek-VL-1.3B at its true dimensions with random weights, a picture and 54 text tokens, of which 20 stand
in front of the picture and are the same in all questions. The first question finds an empty cache. The second
finds the picture and what stands in front of it; only its own words are computed. Before anything is counted
the second answer has to be, token by token, what an empty engine says to it.

    python benchmarks/second_question.py --rounds 3 --json
"""

import argparse
import json
import statistics
import time

import torch
from peer_transformers import TEXT_TOKENS, picture, preset
from sides import fill
from torch import Tensor

from seekvl.engine.engine import Engine
from seekvl.engine.kernels.accelerate import accelerate
from seekvl.engine.kernels.towers import TOWERS
from seekvl.engine.request import Completion, Request, SamplingParams
from seekvl.evals.machine import Neighbours, wait_until_quiet
from seekvl.evals.random_weights import TOKENIZERS
from seekvl.models.vl import VL, VLConfig
from seekvl.models.vl2 import on_meta
from seekvl.processing.encode import ModelInput, TokenBill
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import torch_generator

IN_FRONT = 20
"""Text tokens in front of the picture."""
PEER = "first question"


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    config = preset(tiny=args.tiny).model
    assert isinstance(config, VLConfig)
    model = on_meta(config).to(torch.bfloat16)
    fill(model)
    accelerate(model.language)
    accelerate(model.vision, kernels=TOWERS)
    engine = Engine(model, Tokenizer.from_file(TOKENIZERS[False]))
    ask(engine, question(model, engine.tokenizer, number=0), tokens=2)  # shapes are seen for the first time
    neighbours = Neighbours()
    wait_until_quiet(seconds=args.quiet)
    first, second = [], []
    for number in range(args.rounds):
        inputs = [question(model, engine.tokenizer, number=2 * number + side) for side in (1, 2)]
        engine.forget()
        first.append(ask(engine, inputs[0], tokens=1)[0])
        seconds, kept = ask(engine, inputs[1], tokens=args.tokens)
        second.append(seconds)
        engine.forget()
        _, fresh = ask(engine, inputs[1], tokens=args.tokens)
        if kept.token_ids != fresh.token_ids:
            raise SystemExit(f"the cache changes the answer: {kept.token_ids} and not {fresh.token_ids}")
    report(first, second, cached=kept.usage.cached_tokens, neighbours=neighbours, as_json=args.json)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="pairs of questions")
    parser.add_argument("--tokens", type=int, default=4, help="tokens of the answers that are compared")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--quiet", type=float, default=20.0, help="seconds to wait for an idle machine")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny dimensions: tests the program, not the speed"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    for name in ("rounds", "tokens", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def question(model: VL, tokenizer: Tokenizer, *, number: int) -> ModelInput:
    """Return a question about the one picture, with words of its own behind it."""
    slots, side = model.config.visual_tokens, model.config.image_size
    words: Tensor = torch.randint(0, 600, (IN_FRONT,), generator=torch_generator(0, "in front"))
    own = torch.randint(0, 600, (TEXT_TOKENS - IN_FRONT,), generator=torch_generator(number, "question"))
    ids = torch.cat((words, torch.full((slots,), tokenizer.image_id), own))
    return ModelInput(
        input_ids=ids,
        image_mask=ids == tokenizer.image_id,
        pixels=picture(side),
        low_pixels=None,
        normalized=True,
        loss_weights=None,
        picture_sizes=((side, side),),
        prompt="",
        bill=TokenBill(text_tokens=TEXT_TOKENS, image_tokens=(slots,), total=len(ids), limit=4096),
    )


def ask(engine: Engine, inputs: ModelInput, *, tokens: int) -> tuple[float, Completion]:
    """Return the seconds to the first token of an answer, and the answer."""
    began = time.perf_counter()
    handle = engine.submit(Request(inputs=inputs, params=SamplingParams(max_new_tokens=tokens), end_id=-1))
    piece = next(handle)
    seconds = time.perf_counter() - began
    return seconds, piece.completion or handle.result()


def report(
    first: list[float], second: list[float], *, cached: int, neighbours: Neighbours, as_json: bool
) -> None:
    """Print the table, and the line of JSON."""
    ours, peer = statistics.median(second), statistics.median(first)
    print(f"seconds to the first token, medians of {len(first)} pairs; {cached} tokens were taken over")
    print(f"cores busy with other work: {neighbours.cores():.2f} on average\n")
    for name, value in ((PEER, peer), ("second question", ours), ("share of it", ours / peer)):
        print(f"{name:<20}{value:>10.3f}")
    if as_json:
        figure = {"ours": ours, "peer": peer, "ratio": ours / peer, "unit": "s", "peer_name": PEER}
        print(json.dumps({"second_question": figure}))


if __name__ == "__main__":
    main()
