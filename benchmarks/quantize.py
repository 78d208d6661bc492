"""How far int8 and int4 are from the weights they were made of: words, logits, answers.

For each model and format, beside the plain model in float32:

    KL           divergence of the next token, nats: of nano after every token of its answers, of the golden
                 models, whose weights are random, after every token of their prompts
    likeliest    share of those places with the same likeliest token
    answers      share of greedy answers with exactly the same tokens (of nano: held-out questions)

seekvl leaves matrices as small as those of nano and the golden models as they are; here they are quantised
all the same, unless `--smallest` says otherwise.

    python benchmarks/quantize.py --n 500 --json
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from seekvl.processing.conversation import Conversation
    from seekvl.vlm import VLM

NANO = "seekvl-nano"
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MINIATURES = ("vl1-siglip", "vl1-hybrid", "vl2-tiny-like", "vl2-base-like")
FORMATS = ("int8", "int4")
BATCH = 16
LONGEST = 128
"""Most tokens of an answer."""
GOLDEN_TOKENS = 8
"""Tokens the miniatures answer: their words mean nothing, and soon repeat themselves."""


@dataclass(kw_only=True, slots=True)
class Distance:
    """What one format of one model adds up to."""

    places: int = 0
    divergence: float = 0.0
    """Sum over the places, nats."""
    likeliest: int = 0
    answers: int = 0
    same: int = 0
    different: list[str] = field(default_factory=list)
    """Answers that changed, as "plain -> quantised"."""

    def add_logits(self, plain: "Tensor", other: "Tensor") -> None:
        """Take in the logits f32[t, v] of t places."""
        p, q = plain.log_softmax(dim=-1), other.log_softmax(dim=-1)
        self.places += len(p)
        self.divergence += float((p.exp() * (p - q)).sum())
        self.likeliest += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())

    def figures(self) -> dict[str, float]:
        """Return the means."""
        return {
            "kl": self.divergence / self.places,
            "likeliest": self.likeliest / self.places,
            "answers": self.same / self.answers,
        }


def main() -> None:
    args = parse()
    import torch

    import seekvl
    from seekvl.weights import quantize

    quantize.SMALLEST = args.smallest
    torch.set_num_threads(args.threads)
    print(f"{'model':<16}{'format':<8}{'KL':>12}{'likeliest':>12}{'answers':>12}{'of':>7}{'seconds':>10}")
    found: dict[str, dict[str, float]] = {}
    for name in args.models:
        nano = name == NANO
        folder = NANO if nano else GOLDEN / name
        plain = seekvl.load(folder, device="cpu", dtype="float32")
        asked = list(questions(args.n, seed=args.seed) if nano else prompts(folder))
        longest = LONGEST if nano else GOLDEN_TOKENS
        wanted = answers(plain, asked, longest=longest)
        for kind in args.formats:
            began = time.perf_counter()
            other = seekvl.load(folder, device="cpu", dtype="float32", quantize=kind)
            distance = compare(plain, other, asked, wanted, longest=longest, of_answers=nano)
            figures = distance.figures()
            found[f"{name}, {kind}"] = figures
            seconds = time.perf_counter() - began
            print(
                f"{name:<16}{kind:<8}{figures['kl']:>12.2e}{figures['likeliest']:>12.2%}{figures['answers']:>12.2%}"
                f"{distance.answers:>7}{seconds:>10.1f}",
                flush=True,
            )
            for line in distance.different[: args.show]:
                print(f"    {line}")
    if args.json:
        print(json.dumps(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=500, help="questions to seekvl-nano, shared by all kinds")
    parser.add_argument("--seed", type=int, default=0, help="decides the pictures")
    parser.add_argument("--models", nargs="+", choices=(NANO, *MINIATURES), default=[NANO, *MINIATURES])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--smallest",
        type=int,
        default=0,
        help="numbers of the smallest matrix that is quantised; by default all of them are, for the models "
        "here are so small that seekvl itself leaves their matrices as they are",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--show", type=int, default=0, help="changed answers to print for each format")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.smallest < 0:
        parser.error(f"--smallest must be at least 0, not {args.smallest}")
    for name in ("n", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    return args


def questions(n: int, *, seed: int) -> Iterator["Conversation"]:
    """Draw n held-out questions, of every kind in turn."""
    from seekvl.corpus.nano import sample
    from seekvl.evals.nano import KINDS, examples

    each = -(-n // len(KINDS))
    drawn = [examples(sample, kind, n=each, seed=seed) for kind in KINDS]
    for index in range(n):
        yield drawn[index % len(KINDS)][index // len(KINDS)].conversation


def prompts(folder: Path) -> Iterator["Conversation"]:
    """Read the conversations of a golden model."""
    from seekvl.processing.conversation import parse_messages

    for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]:
        if "conversation" in case:
            turns = [
                turn
                | {"images": [str(GOLDEN / "images" / f"{image}.png") for image in turn.get("images", [])]}
                for turn in case["conversation"]
            ]
            yield parse_messages(turns)


def answers(vlm: "VLM", asked: Sequence["Conversation"], *, longest: int) -> list[list[int]]:
    """Return the tokens of the greedy answers."""
    found = []
    for start in range(0, len(asked), BATCH):
        some = vlm.batch(asked[start : start + BATCH], max_new_tokens=longest)
        found += [answer.token_ids for answer in some]
    return found


def compare(
    plain: "VLM",
    other: "VLM",
    asked: Sequence["Conversation"],
    wanted: Sequence[list[int]],
    *,
    longest: int,
    of_answers: bool,
) -> Distance:
    """Compare a quantised model with the plain one, on answers and on logits of prompts or of answers."""
    distance = Distance()
    for conversation, right, said in zip(asked, wanted, answers(other, asked, longest=longest), strict=True):
        distance.answers += 1
        distance.same += right == said
        if right != said:
            texts = (plain.tokenizer.decode(ids) for ids in (right, said))
            distance.different.append(" -> ".join(texts))
        shown, places = conversation, slice(None)
        if of_answers:
            shown = answered(conversation, plain.tokenizer.decode(right))
            places = slice(-len(right) - 1, -1)  # what stands in front of a token decides it
        distance.add_logits(plain.logits(shown)[places], other.logits(shown)[places])
    return distance


def answered(conversation: "Conversation", text: str) -> "Conversation":
    """Return the conversation with the beginning of an answer."""
    from seekvl.processing.conversation import Conversation, Message, Text

    return Conversation((*conversation.messages, Message("assistant", (Text(text),))), conversation.system)


if __name__ == "__main__":
    main()
