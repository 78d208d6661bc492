"""One process that is measured: it loads a model, answers, and writes what it took as a line of JSON.

Each program gets processes of its own, so that memory is its own, and the threads of one do not spin on the
cores of the other. `evals.speed` starts them:

    python -m seekvl.evals.speed_process JOB

where JOB is a `Job` as JSON. seekvl is asked through what users hold (`load`, `stream`, the engine), with
another picture in every question, and forgets what it has kept of the one before, the system prompt among it.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from seekvl.engine.budget import choose_limits
from seekvl.engine.engine import Engine, read_prompt
from seekvl.engine.request import Completion, SamplingParams
from seekvl.evals.clock import Clock, device_clock
from seekvl.evals.machine import Neighbours, device_memory
from seekvl.evals.peer_llama import LlamaCpp
from seekvl.evals.peers import Transformers, disagreement
from seekvl.processing.choices import Preprocessing
from seekvl.processing.encode import Processor
from seekvl.runtime import DTYPES, SeekVLError
from seekvl.vlm import VLM, Messages, load
from seekvl.weights.config import read_config
from seekvl.weights.load import find_folder, load_tokenizer

Side: TypeAlias = Literal["seekvl", "transformers", "llama.cpp"]

PICTURE = (384, 384)
"""Width and height of the pictures, px."""
TEXT_TOKENS = 54
"""Least tokens of the words of a question."""
COMPARED = 8
"""Greedy tokens that are compared with the peer's."""
SHORTEST = 1.0
"""Seconds of work behind a figure at least: short answers are repeated, the median counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What a process is asked to do; it travels as JSON."""

    side: Side
    model: str
    """A bundled model or a folder."""
    dtype: str
    threads: int
    batches: tuple[int, ...]
    """Answers decoded together, ascending."""
    device: str
    """What computes: the CPU or a CUDA device."""
    tokens: int
    """Tokens of every answer."""
    shown: bool = True
    """Whether the questions show a picture; without one they have as many tokens, all of them words."""
    file: str | None = None
    """What llama.cpp loads: the language model as GGUF."""
    preprocessing: Preprocessing = "seekvl"
    """How pictures become pixels; beside a peer as the peer does it, so that both see the same."""
    check: str | None = None
    """File for logits: compare answers instead of timing them. seekvl writes it, the peer reads it."""
    expected: tuple[int, ...] = ()
    """Greedy tokens of seekvl, for the peer's check."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one process measured."""

    load: float
    """Seconds from the call to a model that can answer; imports are done, the file is in the page cache."""
    first_token: float
    """Seconds from the call of load to the first token of the first answer: what is put off while loading,
    and the kernels made for new shapes, are in it.
    """
    vision: float | None
    """Seconds for a picture: towers and adaptor; None where none was shown."""
    prefill: float
    """Seconds from the picture's features, or from the words, to the first token."""
    decode: dict[str, float]
    """Tokens a second of all answers together, while all of them grow; by the number of answers."""
    memory: dict[str, float]
    """Most memory of the process so far, GiB, see `machine.device_memory`; by the number of answers,
    ascending.
    """
    prompt_tokens: int
    image_tokens: int
    neighbours: float
    """Cores that other processes kept busy meanwhile."""
    level: str | None
    """Level of the CPU kernels, or of the GPU path; None where torch computes."""


def main(text: str) -> dict[str, object]:
    """Do the job; return what to print."""
    values = json.loads(text)
    job = Job(**values | {"batches": tuple(values["batches"]), "expected": tuple(values["expected"])})
    torch.set_num_threads(job.threads)
    try:
        if job.check is not None:
            return CHECKS[job.side](job)
        return asdict(MEASUREMENTS[job.side](job))
    except SeekVLError as error:
        return {"error": str(error)}


def picture(number: int) -> Image.Image:
    """Draw a smooth picture that no other number has."""
    width, height = PICTURE
    across, down = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    shades = (across + 0 * down, 0 * across + down, np.sin((number + 1) * (across + down)) / 2 + 0.5)
    return Image.fromarray((255 * np.stack(shades, axis=2)).astype(np.uint8))


def question(processor: Processor, *, number: int = 0, shown: bool = True) -> list[dict[str, object]]:
    """Return a conversation: a picture, and words of at least `TEXT_TOKENS` tokens; not shown, more words
    stand for the picture's tokens.
    """
    least = TEXT_TOKENS
    if not shown:
        least += sum(processor(question(processor)).bill.image_tokens)
    text = "What is in the picture?"
    while len(processor.tokenizer.encode(text)) < least:
        text += " What else?"
    content: list[dict[str, object]] = [{"type": "text", "text": text}]
    if shown:
        content.insert(0, {"type": "image", "image": picture(number)})
    return [{"role": "user", "content": content}]


def measure_seekvl(job: Job) -> Measured:
    """Load seekvl, answer once to warm up, then measure each batch."""
    neighbours = Neighbours()
    clock = device_clock(torch.device(job.device))
    began = clock()
    vlm = endless(job)
    loaded = clock() - began
    vlm.engine = _roomy_engine(vlm, rows=job.batches[-1])
    asked = question(vlm.processor, shown=job.shown)
    bill = vlm.processor(asked).bill
    _require_room(job, prompt=bill.total, positions=vlm.config.language.max_positions)
    began = clock()
    pieces = vlm.stream(asked, max_new_tokens=job.tokens)
    next(pieces)
    first_token = loaded + clock() - began
    pieces.close()
    shown = 0
    vision, prefill = list[float](), list[float]()

    def answer(rows: int) -> float:
        """Answer questions together; return the tokens a second."""
        nonlocal shown
        asked = [question(vlm.processor, number=shown + row + 1, shown=job.shown) for row in range(rows)]
        shown += rows
        vlm.engine.forget()
        rate, answers = together(vlm, asked, steps=job.tokens - 1, clock=clock)
        for one in answers:
            vision.append(one.timings.vision)
            prefill.append(one.timings.prefill)
        return rate

    decode, memory = _each_batch(job, answer)
    return Measured(
        load=loaded,
        first_token=first_token,
        vision=statistics.median(vision) if job.shown else None,
        prefill=statistics.median(prefill),
        decode=decode,
        memory=memory,
        prompt_tokens=bill.total,
        image_tokens=sum(bill.image_tokens),
        neighbours=neighbours.cores(),
        level=vlm.kernels,
    )


def _roomy_engine(vlm: VLM, *, rows: int) -> Engine:
    """Return an engine that lets so many answers grow at once, each token in a step of its own."""
    limits = choose_limits(vlm.model)
    return Engine(vlm.model, vlm.tokenizer, limits=replace(limits, rows=max(rows, limits.rows), guess=0))


def together(
    vlm: VLM, asked: Sequence[Messages], *, steps: int, clock: Clock
) -> tuple[float, list[Completion]]:
    """Answer questions; return the tokens a second of all answers while every one of them was under way, over
    so many steps, and what the answers took.

    Prompts are read one by one, and who begins first goes on meanwhile:

        answer 1    p t t t t|t t t t|        p: its prompt is read, t: a token
        answer 2      p t t t|t t t t|        between the lines: what counts
        answer 3          p t|t t t t|

    Raises SeekVLError where they do not get under way together, for want of memory or of positions.
    """
    limits, rows = vlm.engine.limits, len(asked)
    first = vlm.prepare(asked[0], SamplingParams())
    pieces = len(read_prompt(first.inputs, chunk=limits.chunk, seamless=False).cuts) + 1
    wait = (rows - 1) * (pieces + len(first.inputs.bill.image_tokens)) * (1 + limits.guess)
    room = vlm.config.language.max_positions - len(first.inputs.input_ids)
    params = SamplingParams(max_new_tokens=min(steps + 1 + wait, room))
    requests = [vlm.prepare(one, params) for one in asked]
    counts, done = [0] * rows, list[Completion]()
    last, begun, before, rates = -1, 0.0, 0, list[float]()
    for index, piece in vlm.engine.answer(requests, cancel=lambda: bool(rates)):
        counts[index] += piece.token_id is not None
        if last < 0 and min(counts) > 0:
            last, begun, before = index, clock(), sum(counts)
        elif index == last and counts[last] == 1 + steps and not rates:
            rates.append((sum(counts) - before) / (clock() - begun))
        if piece.completion is not None:
            done.append(piece.completion)
    if not rates:
        raise SeekVLError(
            f"{rows} answers were not under way together for {steps} steps: there is no room for so many of "
            f"{len(first.inputs.input_ids) + steps:,} tokens; measure smaller batches or shorter answers"
        )
    return rates[0], done


def endless(job: Job) -> VLM:
    """Load a model whose answers have no end token: each is as long as asked for."""
    vlm = load(job.model, device=job.device, dtype=job.dtype, preprocessing=job.preprocessing)
    vlm.tokenizer.eos_id = -1
    return vlm


def measure_transformers(job: Job) -> Measured:
    """Do the same with transformers. It encodes the pictures of a batch together, so that the seconds of
    picture and prompt are those of single answers.
    """
    neighbours = Neighbours()
    peer = _transformers(job)
    processor = _processor(job)
    inputs = processor(question(processor))
    first = peer.answer(inputs, count=2)
    vision, prefill = list[float](), list[float]()

    def answer(rows: int) -> float:
        """Answer one question in so many rows; return the tokens a second."""
        reply = peer.answer(inputs, count=job.tokens, rows=rows)
        if rows == 1:
            vision.append(reply.vision)
            prefill.append(reply.times[0] - reply.vision)
        assert len(reply.times) == job.tokens, "an answer has ended early"
        return rows * (job.tokens - 1) / (reply.times[-1] - reply.times[0])

    decode, memory = _each_batch(job, answer)
    return Measured(
        load=peer.load,
        first_token=peer.load + first.times[0],
        vision=statistics.median(vision),
        prefill=statistics.median(prefill),
        decode=decode,
        memory=memory,
        prompt_tokens=inputs.bill.total,
        image_tokens=sum(inputs.bill.image_tokens),
        neighbours=neighbours.cores(),
        level=None,
    )


def _transformers(job: Job) -> Transformers:
    """Load transformers."""
    device = torch.device(job.device)
    return Transformers(Path(job.model), dtype=DTYPES[job.dtype], device=device, clock=device_clock(device))


def measure_llama(job: Job) -> Measured:
    """Do the same with llama.cpp, with words alone."""
    neighbours = Neighbours()
    prompt = _words(job)
    peer = _llama(job, positions=len(prompt) + job.tokens)
    first = peer.answer(prompt, count=1)
    prefill = list[float]()

    def answer(rows: int) -> float:
        """Answer the question; return the tokens a second."""
        assert rows == 1, "llama.cpp is asked one question at a time"
        reply = peer.answer(prompt, count=job.tokens)
        prefill.append(reply.times[0])
        return (job.tokens - 1) / (reply.times[-1] - reply.times[0])

    decode, memory = _each_batch(job, answer)
    return Measured(
        load=peer.load,
        first_token=peer.load + first.times[0],
        vision=None,
        prefill=statistics.median(prefill),
        decode=decode,
        memory=memory,
        prompt_tokens=len(prompt),
        image_tokens=0,
        neighbours=neighbours.cores(),
        level=None,
    )


def _llama(job: Job, *, positions: int) -> LlamaCpp:
    """Load llama.cpp."""
    assert job.file is not None
    return LlamaCpp(Path(job.file), positions=positions, threads=job.threads, clock=time.perf_counter)


def _words(job: Job) -> list[int]:
    """Return the tokens of a question without a picture."""
    processor = _processor(job)
    tokens: list[int] = processor(question(processor, shown=False)).input_ids.tolist()
    return tokens


def _each_batch(job: Job, answer: Callable[[int], float]) -> tuple[dict[str, float], dict[str, float]]:
    """Answer in every batch until there is enough to tell; return median rates and the memory so far."""
    decode, memory = {}, {}
    for rows in job.batches:
        rates = list[float]()
        if job.device != "cpu":
            answer(rows)  # a GPU compiles and records what it has not met yet
        began = time.perf_counter()
        while not rates or time.perf_counter() - began < SHORTEST:
            rates.append(answer(rows))
        decode[str(rows)] = statistics.median(rates)
        memory[str(rows)] = device_memory(torch.device(job.device))
    return decode, memory


def _require_room(job: Job, *, prompt: int, positions: int) -> None:
    """Refuse answers that the model's longest sequence would cut short."""
    if prompt + job.tokens > positions:
        raise SeekVLError(
            f"answers of {job.tokens:,} tokens were asked for, the prompt of {prompt:,} leaves room for "
            f"{positions - prompt:,} in the model's longest sequence; ask for fewer with --tokens"
        )


def check_seekvl(job: Job) -> dict[str, object]:
    """Write the logits after the prompt; return the greedy tokens that follow."""
    vlm = endless(job)
    asked = question(vlm.processor, shown=job.shown)
    assert job.check is not None
    save_file({"logits": vlm.logits(asked)[-1].clone()}, job.check)
    return {"tokens": vlm.chat(asked, max_new_tokens=COMPARED).token_ids}


def check_transformers(job: Job) -> dict[str, object]:
    """Say where transformers and seekvl do not compute the same."""
    peer = _transformers(job)
    processor = _processor(job)
    theirs = peer.logits(processor(question(processor)), tokens=list(job.expected))
    return _verdict(job, theirs)


def check_llama(job: Job) -> dict[str, object]:
    """Say where llama.cpp and seekvl do not compute the same."""
    prompt, tokens = _words(job), list(job.expected)
    peer = _llama(job, positions=len(prompt) + len(tokens))
    return _verdict(job, peer.logits(prompt, tokens=tokens))


def _verdict(job: Job, theirs: Tensor) -> dict[str, object]:
    """Compare a peer's logits f32[k, v] with what seekvl has written."""
    assert job.check is not None
    ours, dtype = load_file(job.check)["logits"], DTYPES[job.dtype]
    return {"disagreement": disagreement(ours, theirs, tokens=list(job.expected), dtype=dtype)}


def _processor(job: Job) -> Processor:
    """Return what makes prompts for a model, without its network."""
    folder = find_folder(job.model)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    return Processor(
        tokenizer,
        config.image,
        config.template,
        preprocessing=job.preprocessing,
        max_tokens=config.max_tokens,
    )


MEASUREMENTS: dict[Side, Callable[[Job], Measured]] = {
    "seekvl": measure_seekvl,
    "transformers": measure_transformers,
    "llama.cpp": measure_llama,
}

CHECKS: dict[Side, Callable[[Job], dict[str, object]]] = {
    "seekvl": check_seekvl,
    "transformers": check_transformers,
    "llama.cpp": check_llama,
}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
