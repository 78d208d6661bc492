"""Many streaming clients at once on one server: errors, fairness, memory, and what serving costs.

The server is a process of its own, as `seekvl serve` starts it; its clients share the machine with it. Each
client, with a key and a connection of its own, asks one question after the other about one of the pictures in
examples/, or about none, and reads its stream to the end.

Overhead: the same questions go to the engine alone, with as many threads, as many at once and answers of the
same lengths, prepared beforehand and in this process, once before the server runs and once after. What is
missing from its tokens/s is what preparing, serving and the clients cost together; seconds of CPU say how
much of it each took. Clients take little: they wait for sockets, and look at the end of what they read.

Last, in a server within this process, a few clients keep the engine busy while others are timed: from the
engine's first token to the first byte of it that the client reads.

Memory of the server is read once a second. The first quarter is for warming up; the median of the last
quarter may be above that of the second by 2 %. The program ends with 1 where an error came that is not
declared (429 and 503 are), memory grew, or the slowest client got less than half of the median.

    python benchmarks/serve_load.py --minutes 10 --json
"""

import argparse
import asyncio
import base64
import contextlib
import json
import os
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import seekvl
from seekvl.engine.handle import Handle
from seekvl.engine.request import Request, SamplingParams
from seekvl.evals.machine import TICKS, Neighbours, processor
from seekvl.serve.app import create_app
from seekvl.serve.chat import NO_END
from seekvl.serve.run import Server, server_config
from seekvl.serve.settings import Settings

EXAMPLES = Path(__file__).parents[1] / "examples"
QUESTIONS = (
    ("sign.png", "What does the sign say?"),
    ("chart.png", "Which bar is tallest?"),
    (None, "Hello."),
    ("sign.png", "Where is the sign?"),
)
DECLARED = frozenset(("200", "429", "503"))
"""What may become of a request under load."""
GROWTH = 0.02
"""Largest growth of memory that still counts as flat, as a share."""
FAIR = 0.5
"""Least tokens/s of the slowest client, as a share of the median's."""
BOUND = 0.020
"""Seconds that the first byte may come after the first token."""
START_SECONDS = 300.0
PAUSE = 0.5
"""Seconds that a client rests when it was refused."""
SILENCE = 120.0
"""Seconds without a byte for anybody, after which the server counts as hung."""
TAIL = 1000
"""Bytes that are kept of a stream: its last events have less."""


@dataclass(slots=True)
class Client:
    """One client: its connection, the answer it reads, and what it got so far."""

    number: int
    asked: int = 0
    """Questions so far."""
    connection: socket.socket | None = None
    head: bytes = b""
    """The first line of the answer, as far as it has come."""
    tail: bytes = b""
    """The end of what was read of the answer."""
    tokens: int = 0
    ended: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Load:
    """What came of all clients."""

    clients: list[Client]
    seconds: float
    server_cpu: float
    """Seconds of CPU that the server took."""
    clients_cpu: float
    memory: list[float] = field(default_factory=list)
    """Resident memory of the server, GiB, once a second."""

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(client.tokens for client in self.clients)

    @property
    def ended(self) -> Counter[str]:
        """Requests by status; "broken" for a stream without a proper end."""
        return sum((client.ended for client in self.clients), Counter())

    @property
    def rates(self) -> list[float]:
        """Tokens/s of each client, the slowest first."""
        return sorted(client.tokens / self.seconds for client in self.clients)


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends, too
    torch.set_num_threads(args.threads)
    vlm, neighbours = seekvl.load(args.model, device="cpu"), Neighbours()
    before = engine_alone(vlm, args=args)
    with started(args) as (port, process):
        load = drive(port, process.pid, args=args)
    alone = (before, engine_alone(vlm, args=args))
    delays = first_bytes(vlm, args=args)
    print(f"{processor()}; cores busy with other work: {neighbours.cores():.2f} on average")
    sys.exit(report(load, alone=alone, delays=delays, args=args))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="seekvl-nano", help="a bundled model, or a folder")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the clients ask")
    parser.add_argument("--alone", type=float, default=20.0, help="seconds for the engine alone, twice")
    parser.add_argument("--clients", type=int, default=64, help="streams at once")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--probes", type=int, default=40, help="streams whose first byte is timed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the server")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    for name in ("clients", "tokens", "probes", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("minutes", "alone"):
        if not 0 < getattr(args, name) < float("inf"):
            parser.error(f"--{name} must be above 0 and finite, not {getattr(args, name)}")
    return args


@contextlib.contextmanager
def started(args: argparse.Namespace) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run `seekvl serve` until the block ends."""
    port = free_port()
    code = f"import torch; torch.set_num_threads({args.threads}); from seekvl.cli.main import app; app()"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        "--model",
        args.model,
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    process = subprocess.Popen([*command, "--queue", str(2 * args.clients)])
    try:
        until = time.monotonic() + START_SECONDS
        while asyncio.run(status_of(port, "/ready")) != "200":
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def status_of(port: int, path: str) -> str:
    """Get a path; return its status, "none" where nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return "none"
    writer.write(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    line = (await reader.readline()).decode()
    writer.close()
    return line.split()[1] if line else "none"


def body_of(number: int, *, model: str, tokens: int) -> dict[str, Any]:
    """Return the body of question `number`."""
    name, question = QUESTIONS[number % len(QUESTIONS)]
    content: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if name is not None:
        data = base64.b64encode((EXAMPLES / name).read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def request_of(body: dict[str, Any], *, key: str) -> bytes:
    """Write a request as it goes over the wire."""
    text = json.dumps(body).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: localhost",
        f"authorization: Bearer {key}",
        "content-type: application/json",
        f"content-length: {len(text)}",
    )
    return "\r\n".join((*head, "", "")).encode() + text


def drive(port: int, process: int, *, args: argparse.Namespace) -> Load:
    """Let all clients ask until the time is over, and read their last answers."""
    name = model_name(args.model)
    requests = [
        request_of(body_of(n, model=name, tokens=args.tokens), key="KEY") for n in range(len(QUESTIONS))
    ]
    clients, resting = [Client(number) for number in range(args.clients)], dict[int, float]()
    memory, spent, own = list[float](), cpu_seconds(process), time.process_time()
    began = heard = time.monotonic()
    until, waiting = began + 60 * args.minutes, set(range(args.clients))
    with selectors.DefaultSelector() as selector:
        for client in clients:
            ask(client, port, requests, selector=selector)
        while waiting or resting:
            for key, _ in selector.select(timeout=PAUSE):
                heard = time.monotonic()
                outcome = read(key.data, selector=selector)
                if outcome is None:
                    continue
                waiting.discard(key.data.number)
                if heard < until:
                    resting[key.data.number] = heard + (0.0 if outcome == "200" else PAUSE)
            now = time.monotonic()
            if now > heard + SILENCE:
                raise SystemExit(
                    f"the server has said nothing for {SILENCE:g} s; {len(waiting)} clients wait"
                )
            for number in [number for number, end in resting.items() if end <= now]:
                del resting[number]
                ask(clients[number], port, requests, selector=selector)
                waiting.add(number)
            if len(memory) < now - began:
                memory.append(resident(process))
    seconds = time.monotonic() - began
    return Load(clients, seconds, cpu_seconds(process) - spent, time.process_time() - own, memory)


def ask(client: Client, port: int, requests: Sequence[bytes], *, selector: selectors.BaseSelector) -> None:
    """Send the next question of a client, over the connection that it has."""
    if client.connection is None:
        client.connection = socket.create_connection(("127.0.0.1", port), timeout=SILENCE)
        selector.register(client.connection, selectors.EVENT_READ, client)
    request = requests[(client.number + client.asked) % len(requests)]
    client.asked, client.head, client.tail = client.asked + 1, b"", b""
    client.connection.sendall(request.replace(b"KEY", b"client-%d" % client.number, 1))


def read(client: Client, *, selector: selectors.BaseSelector) -> str | None:
    """Read what has come for a client; return what became of its question, None while it goes on."""
    assert client.connection is not None
    try:
        data = client.connection.recv(2**18)
    except OSError:
        data = b""
    if b"\n" not in client.head:
        client.head = (client.head + data)[:100]
    client.tail = (client.tail + data)[-TAIL:]
    if data and not client.tail.endswith(b"\r\n0\r\n\r\n") and not refused(client.head):
        return None
    whole = b"\ndata: [DONE]\n" in client.tail
    outcome = "200" if whole else client.head.split()[1].decode() if refused(client.head) else "broken"
    if whole:
        client.tokens += int(client.tail.rpartition(b'"completion_tokens": ')[2].partition(b",")[0])
    else:  # whatever is left of it is not read
        selector.unregister(client.connection)
        client.connection.close()
        client.connection = None
    client.ended[outcome] += 1
    return outcome


def refused(head: bytes) -> bool:
    """Whether the first line of an answer is there and says that there will be no stream."""
    return b"\n" in head and head.split()[1:2] != [b"200"]


def cpu_seconds(process: int) -> float:
    """Return the seconds of CPU that a process has taken, with all its threads."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident(process: int) -> float:
    """Return the resident memory of a process, GiB."""
    status = Path(f"/proc/{process}/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 2**20


def model_name(model: str) -> str:
    """Return the name that the server gives a model."""
    return Settings(model=model).model_name


def engine_alone(vlm: seekvl.VLM, *, args: argparse.Namespace) -> float:
    """Return tokens/s of the engine where nobody serves: as many answers at once, prepared beforehand."""
    params = SamplingParams(max_new_tokens=args.tokens)
    vlm.processor.remember(2**27)  # as a server does, so that fingerprints of pictures are there
    prepared: list[Request] = []
    for name, question in QUESTIONS:
        content: list[dict[str, object]] = [{"type": "text", "text": question}]
        if name is not None:
            content.insert(0, {"type": "image", "image": EXAMPLES / name})
        asked = vlm.prepare([{"role": "user", "content": content}], params)
        prepared.append(replace(asked, end_id=NO_END))
    left, told = set[Handle](), list[Handle]()
    number = tokens = 0
    began = time.monotonic()
    while time.monotonic() < began + args.alone:
        while len(left) < args.clients:
            request, client = prepared[number % len(prepared)], str(number % args.clients)
            left.add(vlm.engine.submit(request, client=client, notify=told.extend))
            number += 1
        vlm.engine.step()
        for handle in told:
            while (piece := handle.poll()) is not None:
                tokens += piece.token_id is not None
                if piece.completion is not None:
                    left.discard(handle)
        told.clear()
    seconds = time.monotonic() - began
    for handle in left:
        handle.cancel()
    return tokens / seconds


def first_bytes(vlm: seekvl.VLM, *, args: argparse.Namespace) -> list[float]:
    """Return, for some streams on a busy server, seconds from the first token to its first byte."""
    settings = Settings(model=args.model, device="cpu", port=free_port(), queue=2 * args.clients)
    app = create_app(settings, load=lambda _: vlm)
    server = Server(server_config(app, settings), service=app.state.desk.service)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while asyncio.run(status_of(settings.port, "/ready")) != "200":
            time.sleep(0.05)
        with noted_first_tokens(vlm) as (handles, tokens):
            reads = asyncio.run(probe(settings, args=args))
    finally:
        server.should_exit = True
        thread.join(60)
    return [read - tokens[handles[key]] for key, read in reads.items()]


@contextlib.contextmanager
def noted_first_tokens(vlm: seekvl.VLM) -> Iterator[tuple[dict[str, Handle], dict[Handle, float]]]:
    """Let the engine take down the handle of each client, and when the first token of each handle came."""
    handles, tokens = dict[str, Handle](), dict[Handle, float]()
    submit, put = vlm.engine.submit, Handle.put

    def noted(request: Request, *, client: str = "", **more: Any) -> Handle:
        handles[client] = submit(request, client=client, **more)
        return handles[client]

    def come(handle: Handle, item: Any) -> None:
        tokens.setdefault(handle, time.monotonic())
        put(handle, item)

    vlm.engine.submit, Handle.put = noted, come  # type: ignore[method-assign]
    try:
        yield handles, tokens
    finally:
        Handle.put = put  # type: ignore[method-assign]


async def probe(settings: Settings, *, args: argparse.Namespace) -> dict[str, float]:
    """Time streams one after the other while three others keep the engine busy."""
    name, reads = model_name(args.model), dict[str, float]()
    requests = [
        request_of(body_of(n, model=name, tokens=args.tokens), key="KEY") for n in range(len(QUESTIONS))
    ]

    async def ask_on(number: int) -> None:
        while True:
            await first_byte(settings.port, requests[number % len(requests)])
            number += 1

    busy = [asyncio.create_task(ask_on(number)) for number in range(3)]
    for number in range(args.probes):
        key = f"probe-{number}"
        request = request_of(body_of(number, model=name, tokens=4), key=key)
        reads[f"Bearer {key}"] = await first_byte(settings.port, request)
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    return reads


async def first_byte(port: int, request: bytes) -> float:
    """Return when the first event with letters came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    came = 0.0
    while (line := await reader.readline()) and not line.startswith(b"data: [DONE]"):
        if not came and b'"delta": {"content"' in line:
            came = time.monotonic()
    writer.close()
    return came or time.monotonic()


def report(load: Load, *, alone: Sequence[float], delays: Sequence[float], args: argparse.Namespace) -> int:
    """Print what was found; return the exit status."""
    rates, ended = load.rates, load.ended
    served, median, engine = sum(rates), statistics.median(rates), statistics.mean(alone)
    quarter = len(load.memory) // 4
    early = statistics.median(load.memory[quarter : 2 * quarter] or load.memory or [0.0])
    late = statistics.median(load.memory[-quarter:] or [0.0])
    undeclared = sum(count for name, count in ended.items() if name not in DECLARED)
    fair, growth = (rates[0] / median if median else 0.0), (late / early - 1 if early else 0.0)
    print(f"{args.model}: {args.clients} clients for {load.seconds:.0f} s, answers of {args.tokens} tokens")
    for name, count in sorted(ended.items()):
        print(f"  {name:<10}{count:>10,}")
    print(
        f"tokens/s, {args.threads} threads: server {served:,.1f}, engine alone {engine:,.1f} "
        f"({', '.join(f'{rate:,.1f}' for rate in alone)}): {served / engine:.1%}"
    )
    for name, seconds in (("server", load.server_cpu), ("clients", load.clients_cpu)):
        print(
            f"CPU of the {name}: {seconds / load.seconds:.2f} of {os.cpu_count()} cores, "
            f"{1e6 * seconds / max(1, load.tokens):,.0f} microseconds a token"
        )
    print(f"slowest client: {rates[0]:.2f} tokens/s, {fair:.1%} of the median")
    print(f"memory of the server, second and last quarter: {early:.3f} and {late:.3f} GiB ({growth:+.2%})")
    slow = sorted(delays)[int(0.95 * (len(delays) - 1))]
    print(
        f"first byte after the token: median {1e3 * statistics.median(delays):.1f} ms, 95 % {1e3 * slow:.1f}"
    )
    if args.json:
        print(
            json.dumps(figures(served, engine, rates, (early, late), slow) | {"errors": undeclared, **ended})
        )
    return int(undeclared > 0 or fair < FAIR or growth > GROWTH)


def figures(
    served: float, alone: float, rates: Sequence[float], memory: tuple[float, float], delay: float
) -> dict[str, object]:
    """Return the figures in the form of all benchmarks."""
    early, late = memory
    rows = {
        "throughput": (served, alone, "tokens/s", "engine alone"),
        "slowest client": (rates[0], statistics.median(rates), "tokens/s", "median client"),
        "memory": (late, early, "GiB", "second quarter"),
        "first byte": (delay * 1e3, BOUND * 1e3, "ms", "bound"),
    }
    return {
        name: {
            "ours": ours,
            "peer": peer,
            "ratio": ours / peer if peer else 0.0,
            "unit": unit,
            "peer_name": other,
        }
        for name, (ours, peer, unit, other) in rows.items()
    }


if __name__ == "__main__":
    main()
