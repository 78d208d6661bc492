"""How replicas come to run: Ray, started here or joined, and the deployment that Ray Serve looks after."""

import contextlib
import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from seekvl.engine.budget import ROWS
from seekvl.runtime import SeekVLError, require
from seekvl.serve.replica import Replica
from seekvl.serve.settings import Settings

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
HEALTH_SECONDS = 2.0
"""Between two looks of Ray Serve at a replica."""
PARTING_SECONDS = 5.0
"""Time for a replica to end."""
OBJECT_BYTES = 2**30
"""Shared memory of a Ray that is started here; prompts pass through it, a tile takes 1.8 MB."""


def deploy(settings: Settings) -> Any:
    """Start the replicas and wait until they have loaded their model; return Ray Serve's handle.

    Raises SeekVLError where there is no room for them, or one cannot load.
    """
    join(settings)
    name = f"seekvl-{uuid.uuid4().hex[:8]}"
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    try:
        each = share(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        places = ROWS["cuda" if "num_gpus" in each else "cpu"]
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(proxy_location="Disabled", logging_config=quiet)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        deployment = serve.deployment(
            Replica,
            name="replica",
            num_replicas=settings.replicas,
            ray_actor_options=each,
            max_ongoing_requests=places + min(places, settings.queue),
            max_constructor_retry_count=settings.replicas,  # what fails once fails again
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=PARTING_SECONDS,
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER,
                request_router_kwargs={"num_fallback_replicas": settings.replicas},
            ),
            logging_config=quiet,
        )
        # secrets and folders are this process's alone
        told = replace(settings, api_keys=(), webhook_secret=None, store=None, log_prompts=None)
        return serve.run(deployment.bind(told), name=name, route_prefix=None)
    except Exception as error:
        why = str(error) if isinstance(error, SeekVLError) else _why(name) or str(error)
        leave(name)
        raise SeekVLError(f"the replicas could not be started: {why}") from error


def require_ray() -> None:
    """Import Ray, set up by the environment that it reads at its import and hands on to its processes.

    Raises SeekVLError where it is not installed.
    """
    wanted = {"RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1"}  # or SIGTERM prints a trace of C++
    if "RAY_ADDRESS" not in os.environ:
        wanted |= {
            "RAY_AUTH_MODE": "token",  # who has it not is refused, whatever port he finds
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on loopback alone, on Linux too
            "RAY_worker_niceness": "0",  # replicas are no work for idle moments
        }
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # reports to nobody
    require("ray.serve", extra="cluster")


def join(settings: Settings) -> None:
    """Join the cluster that RAY_ADDRESS names, or start a Ray that this machine alone can reach."""
    require_ray()
    import ray

    address = os.environ.get("RAY_ADDRESS")
    try:
        if address is not None:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            return
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=None if settings.replicas <= (os.cpu_count() or 1) else settings.replicas,
            object_store_memory=OBJECT_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:
        where = "could not be started" if address is None else f"cannot be reached at {address}"
        raise SeekVLError(f"Ray {where}: {error}") from error


def share(settings: Settings, machines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return what each replica gets: a GPU where there are any, else as many cores as all can have alike.

    machines: the resources of each, in Ray's names. Raises SeekVLError where there is not enough.

    >>> share(Settings(replicas=2, device="cpu"), [{"CPU": 4}, {"CPU": 4}, {"CPU": 4}])
    {'num_cpus': 4.0}
    """
    gpus, cpus = (sum(int(machine.get(kind, 0)) for machine in machines) for kind in ("GPU", "CPU"))
    if settings.device not in ("auto", "cpu", "cuda"):
        raise SeekVLError(f"a replica gets its device from Ray: use cpu, cuda or auto, not {settings.device}")
    on_gpus = settings.device == "cuda" or (settings.device == "auto" and gpus > 0)
    have, what = (gpus, "GPUs") if on_gpus else (cpus, "CPU cores")
    if have < settings.replicas:
        raise SeekVLError(f"{settings.replicas} replicas need as many {what}; the cluster has {have}")
    if on_gpus:
        return {"num_cpus": 1.0, "num_gpus": 1.0}
    alike = range(cpus // settings.replicas, 0, -1)
    fits = (cores for cores in alike if _places(machines, cores) >= settings.replicas)
    return {"num_cpus": float(next(fits))}


def _places(machines: Sequence[Mapping[str, float]], cores: int) -> int:
    """Return how many replicas with so many cores each there is room for; none lies on two machines."""
    return sum(int(machine.get("CPU", 0)) // cores for machine in machines)


def _why(name: str) -> str | None:
    """Return the last words of a replica that could not start, if it said any: the end of its traceback."""
    from ray import serve

    found = serve.status().applications.get(name)
    told = [deployment.message for deployment in found.deployments.values()] if found else []
    lines = [line.strip() for line in "\n".join(told).splitlines() if line.strip()]
    return lines[-1].removeprefix("seekvl.runtime.SeekVLError: ") if lines else None


def leave(name: str) -> None:
    """Take the replicas of this name down, if there are any, and leave Ray; what was started here ends."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    with contextlib.suppress(RayServeException):  # Ray Serve does not run yet
        serve.delete(name)
    ray.shutdown()
