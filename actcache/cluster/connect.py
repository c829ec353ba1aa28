"""Connects to a scheduler, or starts processes on this machine, as a client of dask."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING

from actcache.errors import ClusterError, ConfigError, first_line
from actcache.status import Say

if TYPE_CHECKING:
    from distributed import Client

_CONNECT_S = 15.0
_FIRST_WORKER_S = 60.0
_CLOSE_S, _CLOSE_LOST_S = 10.0, 1.0


def local_workers(cluster: object) -> int | None:
    """N of `local:N`; None for any other cluster."""
    found = re.fullmatch(r"local:(\d+)", cluster) if isinstance(cluster, str) else None
    if found is None:
        return None
    if int(found[1]) < 1:
        raise ConfigError(f"{cluster!r} means no worker at all; local:2 starts two")
    return int(found[1])


def model_threads(n_workers: int) -> int:
    """Threads of the forward pass in each of `n_workers` on this machine."""
    from dask.system import CPU_COUNT

    return max(1, int(CPU_COUNT) // n_workers)


def check_installed() -> None:
    """Raise `ConfigError` unless dask.distributed is there."""
    if find_spec("distributed") is None:
        raise ConfigError("extraction on a cluster needs dask.distributed; pip install 'actcache[cluster]'")


@contextmanager
def connected(cluster: str | Client, say: Say) -> Iterator[Client]:
    """A client with workers; what was started for it is stopped afterwards.

    Raises:
        ConfigError: the argument does not name a cluster. ClusterError: no scheduler answers, or there is no worker.
    """
    n_workers = local_workers(cluster)
    if n_workers is not None:
        with _local_cluster(n_workers) as client:
            _announce(client, say)
            yield client
    elif not isinstance(cluster, str):
        yield cluster
    elif "://" in cluster:
        with _client_of(cluster) as client:
            _announce(client, say)
            yield client
    else:
        raise ConfigError(f"a cluster is local:N, or a scheduler's address such as tcp://host:8786, not {cluster!r}")


@contextmanager
def _local_cluster(n_workers: int) -> Iterator[Client]:
    from dask import config
    from distributed import Client, LocalCluster

    dashboard = "127.0.0.1:0" if find_spec("bokeh") else None
    settings = {
        # In place of dask's own, in which MALLOC_TRIM_THRESHOLD_ makes the allocator return the pages of every
        # large tensor and fault them in again.
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": model_threads(n_workers)},
        "distributed.worker.profile.enabled": False,
    }
    with (
        config.set(settings),
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            processes=True,
            dashboard_address=dashboard,
            memory_limit=0,  # none: a worker's memory is its model's and that of the shards it is making
            silence_logs=logging.CRITICAL,
            preload=["actcache.cluster.worker"],
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def _client_of(address: str) -> Iterator[Client]:
    from distributed import Client

    with _quiet("distributed.client"):
        try:
            client = Client(address, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"no dask scheduler answers at {address} ({first_line(error)}); start one with 'dask scheduler', "
                "or use local:N for processes of this machine"
            ) from error
        try:
            _wait_for_a_worker(client, address)
            yield client
        finally:
            # Without a scheduler, the client keeps looking for it; the error already says so.
            with suppress(TimeoutError):
                client.close(timeout=_CLOSE_S if client.status == "running" else _CLOSE_LOST_S)


def _wait_for_a_worker(client: Client, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_FIRST_WORKER_S)
    except TimeoutError:
        raise ClusterError(
            f"the scheduler at {address} has had no worker for {_FIRST_WORKER_S:.0f} s; start some with "
            f"'dask worker {address} --nthreads 1'"
        ) from None


@contextmanager
def _quiet(logger_name: str) -> Iterator[None]:
    """While active, silence the log of a part of dask: what matters in it is raised as an error."""
    logger = logging.getLogger(logger_name)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _announce(client: Client, say: Say) -> None:
    threads = client.nthreads()
    say(f"{len(threads)} worker{'s' * (len(threads) > 1)}{_dashboard(client)}")
    shared = [n for n in threads.values() if n > 1]
    if shared:
        say(
            f"Note: {len(shared)} of them take several tasks at a time, but a process makes one after the other; start "
            "more processes of fewer threads ('dask worker --nworkers ... --nthreads 1')"
        )


def _dashboard(client: Client) -> str:
    try:
        link = client.dashboard_link
    except (KeyError, ValueError):  # the scheduler has none
        link = None
    return f"; dashboard: {link}" if link else ""
