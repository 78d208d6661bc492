"""What a benchmark says: figures with their share of the ceiling, as a table and as JSON.

The floor of a figure is the longer of two times: its bytes at the rate memory is read, its operations at the
rate matrices are multiplied, those with quantised matrices at the rate of whole numbers. The share is floor
over measured; it passes 100 % where weights stay in a cache. Bytes are those of weights, and in decoding of
the cache: each once a step, which is the least.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from seekvl.evals.ceilings import Ceilings
from seekvl.models.cost import (
    cache_bytes_per_token,
    language_flops,
    parameters,
    step_parameters,
    vision_flops,
)
from seekvl.models.quantized import Kind
from seekvl.models.vl2 import AnyConfig
from seekvl.weights.quantize import packed_operations, saved_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a figure's work is, at the least."""

    read_bytes: float
    operations: float
    whole_operations: float = 0.0
    """Those of the operations that multiply whole numbers, of a quantised language model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One line of the table."""

    name: str
    unit: str
    """"s", "tok/s" or "GiB"; of tok/s more is better."""
    ours: float
    peer: float | None = None
    work: Work | None = None
    seconds: float = 0.0
    """What the work took."""
    share: float | None = None
    """Of the ceiling, 0 to 1 and a little more; None where there is no work to count."""
    bound: str | None = None
    """What the ceiling is: "memory" or "arithmetic"."""

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return None if self.peer is None else self.ours / self.peer


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything a benchmark found."""

    model: str
    weights: str
    """Where they come from: "bundled", "folder" or "random"."""
    dtype: str
    quantize: Kind | None
    """Format of the language model's matrices; None where they are plain."""
    level: str | None
    """Level of the CPU kernels, or of the GPU path."""
    device: str
    """What computed: "cpu" or "cuda"."""
    machine: str
    """Its name."""
    versions: Mapping[str, str]
    rounds: int
    tokens: int
    prompt_tokens: int
    image_tokens: int
    neighbours: tuple[float, float]
    """Cores that others kept busy: on average, and in the worst process."""
    peer: str | None
    ceilings: Ceilings
    figures: tuple[Figure, ...]

    def json(self) -> str:
        """Write everything as one line of JSON."""
        figures: dict[str, object] = {}
        for figure in self.figures:
            entry: dict[str, object] = {"ours": figure.ours, "unit": figure.unit}
            if figure.share is not None:
                entry |= {"share": figure.share, "bound": figure.bound}
            if self.peer is not None:
                entry |= {"peer": figure.peer, "ratio": figure.ratio, "peer_name": self.peer}
            figures[figure.name] = entry
        values = {
            "model": self.model,
            "weights": self.weights,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "kernels": self.level,
            "device": self.device,
            "machine": self.machine,
            "threads": self.ceilings.threads,
            "versions": dict(self.versions),
            "rounds": self.rounds,
            "tokens": {"prompt": self.prompt_tokens, "picture": self.image_tokens, "answer": self.tokens},
            "neighbours": {"mean": self.neighbours[0], "most": self.neighbours[1]},
            "ceilings": {"read": self.ceilings.read, **self.ceilings.operations},
            "figures": figures,
        }
        return json.dumps(values)

    def table(self) -> str:
        """Write everything for people."""
        return "\n".join([*self._head(), "", *self._ceilings(), "", *self._figures()])

    def _head(self) -> list[str]:
        """Say what was measured, on what, and how quiet it was."""
        mean, most = self.neighbours
        kernels = "torch" if self.level is None else f"kernels {self.level}"
        if self.device != "cpu":
            kernels = f"{self.level or 'torch'} on {self.device}"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        pictures = f"{self.image_tokens:,} of them 1 picture" if self.image_tokens else "all of them words"
        words = [f"{self.peer} runs the text part only; seekvl loads and holds the picture towers, too"]
        return [
            f"{self.model} ({self.weights} weights), {self.quantize or self.dtype}, "
            f"{self.ceilings.threads} threads, {kernels}",
            f"{versions}; {self.machine}",
            f"prompt of {self.prompt_tokens:,} tokens, {pictures}; answers of {self.tokens:,}; "
            f"median of {self.rounds} process{'es' * (self.rounds > 1)}",
            f"cores busy with other work: {mean:.2f} on average, {most:.2f} at most",
            *(words if self.peer is not None and not self.image_tokens else []),
        ]

    def _ceilings(self) -> list[str]:
        """List the machine's ceilings."""
        found = self.ceilings
        moved = "memory copied" if found.reader == "copy" else "memory read"
        lines = ["ceiling", f"{moved:<20}{found.read / 1e9:>10.1f} GB/s"]
        for name, rate in found.operations.items():
            unit = "GOP/s" if name == "int8" else "GFLOP/s"
            lines.append(f"{f'{name} products':<20}{rate / 1e9:>10.1f} {unit}")
        return lines

    def _figures(self) -> list[str]:
        """List the figures."""
        sides = "" if self.peer is None else f"{self.peer:>15}{'seekvl/peer':>13}"
        lines = [
            f"{'figure':<20}{'seekvl':>10} {'unit':<6}{'of ceiling':>11}  {'bound by':<11}{sides}".rstrip()
        ]
        for figure in self.figures:
            share = "" if figure.share is None else f"{100 * figure.share:.0f} %"
            cells = (
                f"{figure.name:<20}{figure.ours:>10.3f} {figure.unit:<6}{share:>11}  {figure.bound or '':<11}"
            )
            if figure.peer is not None:
                cells += f"{figure.peer:>15.3f}{figure.ratio:>13.2f}"
            lines.append(cells.rstrip())
        return lines


def works(
    config: AnyConfig,
    *,
    prompt: int,
    views: int,
    tokens: int,
    batches: Sequence[int],
    itemsize: int,
    kind: Kind | None = None,
) -> dict[str, Work]:
    """Return the work behind each figure that has any: vision, prefill, and the steps of decoding.

    prompt: tokens of it. views: squares that pass the towers for its picture. tokens: of the answer; a step
    sees half of them on average. itemsize: bytes of a plain number. kind: format of the language model.
    """
    language = config.language
    per_token = cache_bytes_per_token(language, bytes_per_number=itemsize)
    parts = parameters(config)
    seen = prompt + tokens // 2

    def weights(rows: int) -> float:
        """Bytes of weights that so many tokens read together."""
        saved = 0.0 if kind is None else saved_bytes(config, kind, itemsize=itemsize, rows=rows)
        return step_parameters(language, rows=rows) * itemsize - saved

    def whole(tokens: int) -> float:
        """Operations with packed matrices of so many tokens, the last of which passes the head."""
        return 0.0 if kind is None else packed_operations(config, kind, itemsize=itemsize, tokens=tokens)

    found = {
        "vision": Work(
            read_bytes=(parts["vision"] + parts["adaptor"]) * itemsize,
            operations=vision_flops(config, pictures=views),
        ),
        "prefill": Work(
            read_bytes=weights(prompt),
            operations=language_flops(language, tokens=prompt),
            whole_operations=whole(prompt),
        ),
    }
    for rows in batches:
        found[decode(rows)] = Work(
            read_bytes=weights(rows) + rows * seen * per_token,
            operations=rows * language_flops(language, tokens=1, past=seen),
            whole_operations=rows * whole(1),
        )
    return found


def decode(rows: int) -> str:
    """Name the figure of decoding so many answers together."""
    return f"decode, batch {rows}"


def memory(rows: int) -> str:
    """Name the figure of memory up to so many answers together."""
    return f"memory, batch {rows}"
