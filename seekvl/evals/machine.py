"""The machine that is measured on: its name, this process's memory, how busy others are, and a wait until
they are not.

Two-thread timings with a busy neighbour are worthless, many times off; a figure is worth as much as the quiet
around it, so benchmarks print both.
"""

import os
import platform
import time
from pathlib import Path

import torch

TICKS = os.sysconf("SC_CLK_TCK")


class Neighbours:
    """Measures the cores that other processes keep busy, from its making to each call."""

    def __init__(self) -> None:
        self._start = self._marks()

    def cores(self) -> float:
        """Return the cores others used on average since the start; 0.0 where the system does not say."""
        total, own, wall = (after - before for after, before in zip(self._marks(), self._start, strict=True))
        return max(0.0, (total - own) / max(wall, 1e-9))

    @staticmethod
    def _marks() -> tuple[float, float, float]:
        """Return CPU seconds of the machine, CPU seconds of this process and its children, and the clock."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return machine_seconds(own), own, time.perf_counter()


def machine_seconds(fallback: float) -> float:
    """Return the CPU seconds the whole machine has worked; the fallback where there is no /proc/stat."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, interrupt, soft, stolen = map(int, file.readline().split()[1:9])
    except FileNotFoundError:
        return fallback
    return (user + nice + system + interrupt + soft + stolen) / TICKS


def wait_until_quiet(*, seconds: float, limit: float = 0.2) -> bool:
    """Wait until others use fewer cores than the limit, at most this long; return whether they do."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        neighbours = Neighbours()
        time.sleep(0.4)
        if neighbours.cores() < limit:
            return True
    return False


def peak_memory() -> float:
    """Return the largest resident memory this process had, GiB.

    Linux hands `ru_maxrss` of the parent on to a new program, so that a parent who has just written the
    weights would be measured instead; the status file starts anew.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if platform.system() == "Darwin" else 2**20)


def resident_memory() -> float:
    """Return the resident memory of this process now, GiB; without /proc the largest it had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 2**20


def processor() -> str:
    """Return the name of the CPU, as far as the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """Return the name of what computes: a GPU's, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def device_memory(device: torch.device) -> float:
    """Return the most memory this process had, GiB: of a GPU what torch has handed out there, else resident
    memory.
    """
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else peak_memory()


def fill_page_cache(folder: Path) -> None:
    """Read the weights of a checkpoint folder once, so that loading them is not a figure of the disk."""
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.gguf")):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
