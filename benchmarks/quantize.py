"""How far bfloat16, int8 and int4 are from the weights they were made of: words, logits, answers.

For each model and format, beside the plain model in float32:

    share        numbers of the language model's matrices that are in the format or a smaller one
    KL           divergence of the next token, nats: of the bundled models after every token of the first
                 answers, of the golden ones, whose weights are random, after every token of their prompts
    likeliest    share of those places with the same likeliest token
    answers      share of greedy answers with exactly the same tokens (of bundled models: held-out questions)
    alike        the same, but that boxes may overlap by 0.9 only

Each format is shown as `load(quantize=)` rounds it, then calibrated by drawn pictures, and, of the bundled
models, calibrated with each `--agreement`. seekvl leaves matrices as small as these models have as they are;
here they are quantised all the same, unless `--smallest` says otherwise.

    python benchmarks/quantize.py --n 500 --json
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from seekvl.processing.conversation import Conversation
    from seekvl.vlm import VLM

BUNDLED = ("seekvl-nano", "seekvl-nano-moe")
GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MINIATURES = ("vl1-siglip", "vl1-hybrid", "vl2-tiny-like", "vl2-base-like")
FORMATS = ("bfloat16", "int8", "int4")
OVERLAP = 0.9
"""IoU from which two boxes are taken for alike."""
GOLDEN_PICTURES = 32
"""Pictures that miniatures are calibrated by, at most: enough for weights without meaning."""
COMPARED = 100
"""Answers whose logits are compared."""
COORDINATES = re.compile(r"\[\[.*?\]\]")
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
    alike: int = 0
    different: list[str] = field(default_factory=list)
    """Answers that changed, as "plain -> quantised"."""

    def add_logits(self, plain: "Tensor", other: "Tensor") -> None:
        """Take in the logits f32[t, v] of t places."""
        p, q = plain.double().log_softmax(dim=-1), other.double().log_softmax(dim=-1)
        self.places += len(p)
        self.divergence += float((p.exp() * (p - q)).sum())
        self.likeliest += int((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())

    def figures(self) -> dict[str, float]:
        """Return the means."""
        return {
            "kl": self.divergence / self.places,
            "likeliest": self.likeliest / self.places,
            "answers": self.same / self.answers,
            "alike": self.alike / self.answers,
        }


def main() -> None:
    args = parse()
    import torch

    import seekvl

    torch.set_num_threads(args.threads)
    print(
        f"{'model':<17}{'format':<18}{'share':>8}{'KL':>10}{'likeliest':>11}{'answers':>9}{'alike':>9}"
        f"{'of':>6}{'seconds':>9}"
    )
    found: dict[str, dict[str, float]] = {}
    for name in args.models:
        bundled = name in BUNDLED
        folder = name if bundled else GOLDEN / name
        plain = seekvl.load(folder, device="cpu", dtype="float32")
        asked = list(questions(args.n, seed=args.seed) if bundled else prompts(folder))
        side = Side(plain, asked, longest=LONGEST if bundled else GOLDEN_TOKENS, of_answers=bundled)
        for row, other, share in others(folder, args, bundled=bundled):
            began = time.perf_counter()
            distance = side.compare(other)
            other.engine.close()
            figures = {"share": share, **distance.figures()}
            found[f"{name}, {row}"] = figures
            print(
                f"{name:<17}{row:<18}{share:>8.1%}{figures['kl']:>10.1e}{figures['likeliest']:>11.2%}"
                f"{figures['answers']:>9.1%}{figures['alike']:>9.1%}{distance.answers:>6}"
                f"{time.perf_counter() - began:>9.1f}",
                flush=True,
            )
            for line in distance.different[: args.show]:
                print(f"    {line}")
    if args.json:
        print(json.dumps(found))


def others(
    folder: str | Path, args: argparse.Namespace, *, bundled: bool
) -> Iterator[tuple[str, "VLM", float]]:
    """Yield what is compared: its name, the model, and the share of its numbers that is quantised."""
    import seekvl
    from seekvl.recipes.calibration import calibration_passages
    from seekvl.vlm import VLM
    from seekvl.weights.calibrate import calibrated_parts
    from seekvl.weights.quantize import quantize_model

    passages = None
    for kind in args.formats:
        if kind == "bfloat16":
            yield kind, seekvl.load(folder, device="cpu", dtype="bfloat16"), 1.0
            continue
        other = seekvl.load(folder, device="cpu", dtype="float32", quantize=kind, smallest=args.smallest)
        yield kind, other, share_of(other)
        if not args.pictures:
            continue
        if passages is None:
            asked = seekvl.load(folder, device="cpu", dtype="float32")
            pictures = args.pictures if bundled else min(args.pictures, GOLDEN_PICTURES)
            passages = calibration_passages(asked, "drawn", n=pictures)
        for agreement in (None, *(args.agreement if bundled else ())):
            other = seekvl.load(folder, device="cpu", dtype="float32")
            parts = calibrated_parts(other.model, kind, passages, agreement=agreement, smallest=args.smallest)
            quantize_model(other.model, kind, parts=parts)
            other = VLM(other.model, other.processor)
            row = f"{kind} calibrated" if agreement is None else f"{kind} at {agreement:.0%}"
            yield row, other, share_of(other)


def share_of(vlm: "VLM") -> float:
    """Return the share of the numbers in a language model's matrices that is quantised."""
    from torch import nn

    from seekvl.models.moe import Experts
    from seekvl.models.quantized import QuantizedExperts, QuantizedLinear

    quantised = total = 0
    for module in vlm.model.language.modules():
        if isinstance(module, QuantizedLinear):
            numbers = module.in_features * module.out_features
        elif isinstance(module, QuantizedExperts):
            numbers = 3 * module.count * module.channels * module.width
        elif isinstance(module, nn.Linear | Experts):
            numbers = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        else:
            continue
        total += numbers
        quantised += numbers if isinstance(module, QuantizedLinear | QuantizedExperts) else 0
    return quantised / total


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--n", type=int, default=500, help="questions to a bundled model, shared by all kinds"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides the pictures")
    parser.add_argument(
        "--models", nargs="+", choices=(*BUNDLED, *MINIATURES), default=[*BUNDLED, *MINIATURES]
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--smallest",
        type=int,
        default=0,
        help="numbers of the smallest matrix that is quantised; by default all of them are, for the models "
        "here are so small that seekvl itself leaves their matrices as they are",
    )
    parser.add_argument("--pictures", type=int, default=320, help="drawn to calibrate by; 0 leaves it out")
    parser.add_argument(
        "--agreement",
        type=float,
        nargs="*",
        default=[0.98, 0.95],
        help="shares of answers that calibrating is to keep, a row each",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--show", type=int, default=0, help="changed answers to print for each format")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    if args.smallest < 0:
        parser.error(f"--smallest must be at least 0, not {args.smallest}")
    if args.pictures == 1 or args.pictures < 0:
        parser.error(f"--pictures must be 0, or 2 and more, not {args.pictures}")
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


class Side:
    """The plain model, with what it says of all questions."""

    def __init__(
        self, plain: "VLM", asked: Sequence["Conversation"], *, longest: int, of_answers: bool
    ) -> None:
        """Ask it. Logits are those of answers, or of prompts."""
        self.asked, self.longest = asked, longest
        self.decode = plain.tokenizer.decode
        self.said = answers(plain, asked, longest=longest)
        self.shown: list[Conversation] = []
        self.places: list[slice] = []
        for conversation, ids in zip(asked[:COMPARED], self.said, strict=False):
            shown = answered(conversation, self.decode(ids)) if of_answers else conversation
            self.shown.append(shown)
            # what stands in front of a token decides it
            self.places.append(slice(-len(ids) - 1, -1) if of_answers else slice(None))
        self.logits = self._logits(plain)

    def _logits(self, vlm: "VLM") -> list["Tensor"]:
        """Return the logits f32[t, v] of each of the first answers, or prompts."""
        return [vlm.logits(shown)[some].clone() for shown, some in zip(self.shown, self.places, strict=True)]

    def compare(self, other: "VLM") -> Distance:
        """Compare a quantised model with the plain one."""
        distance = Distance()
        said = answers(other, self.asked, longest=self.longest)
        for right, found in zip(self.said, said, strict=True):
            distance.answers += 1
            distance.same += right == found
            texts = self.decode(right), self.decode(found)
            distance.alike += right == found or alike(*texts)
            if right != found:
                distance.different.append(" -> ".join(texts))
        for plain, logits in zip(self.logits, self._logits(other), strict=True):
            distance.add_logits(plain, logits)
        return distance


def alike(one: str, other: str) -> bool:
    """Whether two answers say the same, with boxes that overlap by `OVERLAP`."""
    from seekvl.processing.grounding import iou, parse_boxes

    if COORDINATES.sub("", one) != COORDINATES.sub("", other):
        return False
    pairs = list(zip(parse_boxes(one), parse_boxes(other), strict=False))
    same = len(parse_boxes(one)) == len(parse_boxes(other)) > 0
    return same and all(iou(*pair) >= OVERLAP for pair in pairs)


def answered(conversation: "Conversation", text: str) -> "Conversation":
    """Return the conversation with the beginning of an answer."""
    from seekvl.processing.conversation import Conversation, Message, Text

    return Conversation((*conversation.messages, Message("assistant", (Text(text),))), conversation.system)


if __name__ == "__main__":
    main()
