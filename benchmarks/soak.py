"""Random requests for hours, in one process: every answer must be right and memory flat.

Round after round new pictures and questions are drawn: one picture or two, one of long texts in front, greedy
or drawn, with stop strings, boxes or a choice of answers. Each is first answered alone, by an engine that
keeps nothing. Then clients in threads of their own ask for them in random order from one engine, which keeps
prefixes and pictures for as long as it lives: they hang up at random, set deadlines, and fill its queue. An
answer that came to its end must be, token by token, the one given alone; of a cancelled one, its beginning.

Memory is read at the end of every round. The first quarter is for warming up, so what is kept of pictures
must be full by then; the median of the last quarter may be above that of the second by 2 %. The program ends
with 1 where memory grew, an answer was wrong or an error came that nobody declared.

    python benchmarks/soak.py --minutes 120
"""

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

import seekvl
from seekvl.corpus import nano as corpus
from seekvl.engine.budget import choose_limits
from seekvl.engine.engine import Engine
from seekvl.engine.handle import DeadlinePassed, Handle
from seekvl.engine.request import Completion, Form, Request, SamplingParams
from seekvl.engine.scheduler import QueueFull
from seekvl.evals.machine import resident_memory
from seekvl.processing.conversation import Conversation, Message, Text
from seekvl.vlm import VLM

GROWTH = 0.02
"""Largest growth of memory that still counts as flat, as a share."""
COLOURS = ("red", "blue", "green", "a colour that is not there")
LONG = "Look at it with care, then answer in as few words as you can. "
ROWS, QUEUE = 6, 8
"""Answers that grow at once, and requests that wait: fewer than clients, so that some are turned away."""


@dataclass(frozen=True, slots=True)
class Question:
    """A request with the answer it gets alone."""

    request: Request
    alone: Completion


@dataclass(slots=True)
class Tally:
    """What came of the requests so far; clients write to it in turn."""

    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, *, fault: str = "") -> None:
        """Count an outcome, and take a fault down."""
        with self.lock:
            self.ended[outcome] += 1
            if fault:
                self.wrong.append(fault)
                print(f"WRONG: {fault}", file=sys.stderr)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    vlm = seekvl.load(args.model)
    limits = choose_limits(vlm.model, rows=ROWS, queue=QUEUE, feature_bytes=args.feature_mb << 20)
    engine = Engine(vlm.model, vlm.tokenizer, limits=limits)
    engine.start()
    tally, began = Tally(), time.monotonic()
    memory: list[float] = []
    end = began + 60 * args.minutes
    number = 0
    while time.monotonic() < end or len(memory) < 4:
        draw = random.Random(f"{args.seed} {number}")
        questions = [ask_alone(vlm, draw_question(vlm, draw, seed=args.seed)) for _ in range(args.pool)]
        serve(engine, questions, tally=tally, args=args, number=number)
        memory.append(resident_memory())
        minutes = (time.monotonic() - began) / 60
        counts = ", ".join(f"{count:,} {name}" for name, count in sorted(tally.ended.items()))
        kept = engine.metrics().feature_bytes / 2**20
        print(
            f"{minutes:7.1f} min  {memory[-1]:.3f} GiB, {kept:.1f} MiB of pictures  {counts}", file=sys.stderr
        )
        number += 1
    engine.close()
    sys.exit(report(tally, memory, args=args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="seekvl-nano", help="a bundled model, or a folder")
    parser.add_argument("--minutes", type=float, default=120.0, help="how long; at least four rounds")
    parser.add_argument("--pool", type=int, default=40, help="new questions in a round")
    parser.add_argument("--clients", type=int, default=16, help="threads that ask")
    parser.add_argument("--each", type=int, default=25, help="requests of a client in a round")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--feature-mb", type=int, default=8, help="MiB of pictures' features that are kept")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    for name in ("pool", "clients", "each", "threads", "feature_mb"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not 0 < args.minutes < float("inf"):
        parser.error(f"--minutes must be above 0 and finite, not {args.minutes}")
    return args


def draw_question(vlm: VLM, draw: random.Random, *, seed: int) -> Request:
    """Draw a request about new pictures."""
    kind = draw.choice([None, None, "two_pictures", "caption"])
    drawn = corpus.sample(seed, draw.randrange(2**31), kind=kind, held_out=True, questions=1).conversation
    first = drawn.messages[0]
    if draw.random() < 0.3:
        first = Message("user", (*first.parts, Text(" " + LONG * draw.randint(1, 4))))
    stop: str | None = draw.choice([None, None, None, ".", "e"])
    forms: list[Form | None] = [None, None, "boxes", "box_first", list(COLOURS)]
    form = None if stop else draw.choice(forms)
    params = SamplingParams(
        max_new_tokens=draw.choice([1, 3, 10, 40, 80] if form is None else [40, 80]),  # a form needs room
        temperature=draw.choice([0.0, 0.0, 0.8]),
        top_p=draw.choice([1.0, 0.9]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
        seed=draw.randrange(2**31),
        stop=stop,
        constrain=form,
    )
    return Request(inputs=vlm.processor(Conversation((first,), system=drawn.system)), params=params)


def ask_alone(vlm: VLM, request: Request) -> Question:
    """Answer a request in an engine that has nothing else to do and remembers nothing."""
    engine = Engine(vlm.model, vlm.tokenizer, limits=choose_limits(vlm.model, rows=1))
    return Question(request, engine.submit(request).result())


def serve(
    engine: Engine, questions: list[Question], *, tally: Tally, args: argparse.Namespace, number: int
) -> None:
    """Let the clients ask; return when all of them are done."""

    def client(index: int) -> None:
        draw = random.Random(f"{args.seed} {number} {index}")
        for _ in range(args.each):
            question = draw.choice(questions)
            deadline = draw.choice([None, None, None, 0.05, 5.0])
            patience = draw.choice([None, None, 0, 1, 5])
            try:
                handle = engine.submit(question.request, client=str(index % 4), deadline=deadline)
                compare(handle, question, patience=patience, tally=tally, timed=deadline is not None)
            except QueueFull:
                tally.add("turned away")
                time.sleep(draw.random() * 0.1)
            except DeadlinePassed:
                tally.add("overdue")
            except Exception as error:
                tally.add("failed", fault=f"round {number}, client {index}: {error!r}")

    threads = [threading.Thread(target=client, args=(index,)) for index in range(args.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def compare(handle: Handle, question: Question, *, patience: int | None, tally: Tally, timed: bool) -> None:
    """Draw an answer, hang up after so many pieces, and compare it with the one given alone."""
    if patience == 0:
        handle.cancel()
    texts: list[str] = []
    done: Completion | None = None
    for piece in handle:
        texts.append(piece.text)
        done = piece.completion
        if len(texts) == patience:
            handle.cancel()
    hung_up = timed or patience is not None
    fault = fault_of(done, "".join(texts), alone=question.alone, hung_up=hung_up)
    tally.add("wrong" if done is None or fault else done.finish_reason, fault=fault)


def fault_of(done: Completion | None, drawn: str, *, alone: Completion, hung_up: bool) -> str:
    """Say what is wrong with an answer, "" for nothing; `drawn` is its pieces joined."""
    if done is None:
        return "it ended without a completion"
    if drawn != done.text:
        return f"pieces join to {drawn!r}, the answer is {done.text!r}"
    if done.token_ids != alone.token_ids[: len(done.token_ids)]:
        return f"tokens {done.token_ids} instead of {alone.token_ids}"
    if done.finish_reason == "cancelled" and hung_up:
        return ""
    found, wanted = ((x.finish_reason, x.text, x.token_ids) for x in (done, alone))
    return "" if found == wanted else f"{found[:2]} instead of {wanted[:2]}"


def report(tally: Tally, memory: list[float], *, args: argparse.Namespace) -> int:
    """Print what was found; return the exit status."""
    quarter = len(memory) // 4
    early, late = statistics.median(memory[quarter : 2 * quarter]), statistics.median(memory[-quarter:])
    growth = late / early - 1
    asked = sum(tally.ended.values())
    print(f"{args.model}: {asked:,} requests in {len(memory)} rounds, of {args.clients} clients at once")
    for name, count in sorted(tally.ended.items()):
        print(f"{name:<16}{count:>10,}")
    print(f"wrong or failed: {len(tally.wrong)}")
    print(f"memory, second and last quarter: {early:.3f} and {late:.3f} GiB ({growth:+.2%})")
    if args.json:
        print(json.dumps({"requests": asked, "wrong": len(tally.wrong), "growth": growth, **tally.ended}))
    return int(bool(tally.wrong) or growth > GROWTH)


if __name__ == "__main__":
    main()
