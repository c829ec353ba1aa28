"""Hand out shards until all are made.

The store is the only list of what is done. Tasks return nothing that counts; the driver lists commit records after all
tasks have ended and hands out again what has none. So a task may die, run twice, or be passed over because another
process makes its shards. Tasks are groups of neighbouring shards, large ones first and single ones at the end (guided
self-scheduling): within a group one shard is encoded while the model runs over the next, and at the end nobody waits
for a long task.
"""

from __future__ import annotations

import queue
import re
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from actcache.addresses import shown
from actcache.auditing import check_before_sealing
from actcache.cluster.connect import check_installed, connected, local_workers, model_threads
from actcache.cluster.sums import Sums
from actcache.cluster.worker import Report, Task, make_shards, where
from actcache.errors import ActcacheError, ClusterError, ConfigError, StoreBusyError
from actcache.extraction import BatchSequences, begin
from actcache.spec import Dtype, TokenBlocks
from actcache.status import Say, Watch, ignore
from actcache.store import Check, Objects, Store, StoreWriter, open_store, to_write
from actcache.store_options import StoreOptions

if TYPE_CHECKING:
    from distributed import Client, Future

    from actcache.lm import LanguageModel

_TICK_S = 0.5
_LOOK_FOR_WORKERS_S = 10.0
_PAUSE_S = 2.0
_PATIENCE_S = 600.0
"""Wait so long for others to commit what they are making, and for a new worker when none is left."""
_RETRIES = 2
"""Further attempts at a task that raises: faults of disks and networks may pass."""
_MOST_SHARDS = 8
"""Most shards of a task. They overlap: one is encoded while the model runs over the next."""


def extract_on_cluster(
    lm: LanguageModel,
    blocks: TokenBlocks,
    patterns: Sequence[str],
    path: str | Path,
    *,
    cluster: str | Client,
    codec: str | Mapping[str, str] = "lossless",
    dtype: Dtype = "bfloat16",
    skip_first: int = 1,
    seed: int = 0,
    sequences_per_shard: int | None = None,
    rows_per_chunk: int | None = None,
    batch_sequences: BatchSequences | None = None,
    threads: int | None = None,
    audit: bool = True,
    durable: bool = True,
    watch: Watch | None = None,
    say: Say | None = None,
) -> Store:
    """Write the store that `extract` writes, by the workers of a cluster, and return it sealed.

    Every worker process opens the model once. Workers may join, leave and die; after an interruption of the whole, the
    same call goes on. The store and the model's folder must be reachable for all workers under the same names.

    Args:
        lm: the base model, opened by name or from a folder (`lm.recipe` is what the workers open).
        blocks: `(Q, T)` tokens, already in the order in which they are to be stored.
        patterns: hook names or glob patterns of them.
        path: folder or URL of the store.
        cluster: `local:N` for N processes of this machine, a scheduler's address (`tcp://host:8786`), or a client.
        codec: as for `extract`; so are `dtype`, `skip_first`, `seed`, `sequences_per_shard` and `rows_per_chunk`.
        dtype: logical element type.
        skip_first: leading positions of each sequence that are not kept.
        seed: seed of the shuffle of rows within shards.
        sequences_per_shard: sequences of a shard.
        rows_per_chunk: rows of the unit of reading.
        batch_sequences: as for `extract`; `auto` is found out here, on the driver.
        threads: encoding threads of each worker; by default its share of its machine's cores.
        audit: the process that seals the store audits it first, as `extract` does.
        durable: as for `extract`.
        watch: called with a `Status` of all workers together, about twice a second.
        say: called with sentences for the user, such as where the dashboard is.

    Raises:
        ConfigError: the model was given as an object, so workers cannot open it. ClusterError: no scheduler or worker
        answers, or workers repeatedly die or fail at the same shards. StoreBusyError: another process holds the last
        shards and does not finish them. StoreMismatchError: a worker has another model. The others are those of
        `extract`.

    Warns:
        UserWarning: what a worker warns of, once.
    """
    options = StoreOptions(
        codec=codec,
        dtype=dtype,
        skip_first=skip_first,
        seed=seed,
        sequences_per_shard=sequences_per_shard,
        rows_per_chunk=rows_per_chunk,
    )
    check_installed()
    if lm.recipe is None:
        raise ConfigError(
            f"{lm.name} was given as an object, and workers can only open a model themselves; "
            "open it by its name or from its folder, with load_lm or --model"
        )
    place = _place_of(path)
    with connected(cluster, say or ignore) as client:
        n_local = local_workers(cluster)
        n_model_threads = None if n_local is None else model_threads(n_local)
        with _torch_threads(n_model_threads):
            begin(lm, blocks, patterns, place, options, batch_sequences=batch_sequences, durable=durable)
        task = Task(
            shards=(),
            path=place,
            recipe=lm.recipe,
            topic=f"actcache-{uuid.uuid4().hex}",
            batch_sequences=batch_sequences if isinstance(batch_sequences, int) else None,
            threads=threads,
            durable=durable,
            model_threads=n_model_threads,
            workers_per_machine=1,
            audit=audit,
        )
        Driver(client, task, watch or ignore).run()
    return seal(to_write(place, durable=durable), check_before_sealing(lm, "extract") if audit else None)


class Driver:
    """Keeps the workers busy with shards that are missing, and adds up what they report.

    Args:
        client: of the cluster.
        task: what all tasks have in common; shards and the number of workers of a machine are filled in.
        watch: told how far the whole is.
    """

    def __init__(self, client: Client, task: Task, watch: Watch) -> None:
        self._client, self._task, self._watch = client, task, watch
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: dict[str, tuple[Future, Task]] = {}
        self._warned: set[str] = set()
        self._workers: list[str] = []
        self._look_again_at = self._seen_at = monotonic()
        store = open_store(task.path)
        self._n_shards = store.spec.n_shards
        self._sums = Sums(store.spec, store.committed)

    def run(self) -> None:
        """Hand out missing shards until there are none; tasks that are still out at the end are cancelled."""
        self._client.subscribe_topic(self._task.topic, lambda event: self._inbox.put(event[1]))
        try:
            missing, changed_at = self._missing(), monotonic()
            while missing:
                self._round(missing)
                before, missing = missing, self._missing()
                if len(missing) < len(before):
                    changed_at = monotonic()
                elif monotonic() > changed_at + _PATIENCE_S:
                    raise self._others_hold(missing)
                else:
                    sleep(_PAUSE_S)  # another process is making them
            self._watch(self._sums.status())
        except KeyboardInterrupt as interrupt:
            n_done = self._n_shards - len(self._missing())
            interrupt.add_note(f"{n_done} of {self._n_shards} shards of {shown(self._task.path)} are on disk")
            raise
        finally:
            with suppress(OSError, RuntimeError, ValueError):  # the connection may be what was lost
                self._client.cancel([future for future, _ in self._running.values()])
                self._client.unsubscribe_topic(self._task.topic)

    def _missing(self) -> list[int]:
        """Shards without commit records."""
        committed = open_store(self._task.path).committed
        self._sums.found(committed)
        return sorted(set(range(self._n_shards)) - set(committed))

    def _round(self, missing: Sequence[int]) -> None:
        """Have each of the missing shards tried once.

        Slightly more tasks than workers are out at a time, so that no worker waits for the next; the rest can still go
        to workers that join later.
        """
        left = deque(missing)
        while left or self._running:
            n_workers = self._n_workers()
            while left and len(self._running) < n_workers + max(1, n_workers // 4):
                self._hand_out(_next_group(left, n_workers))
            with suppress(queue.Empty):
                self._take(self._inbox.get(timeout=_TICK_S))
            self._watch(self._sums.status())

    def _n_workers(self) -> int:
        """Number of worker processes, looked up now and then.

        Raises:
            ClusterError: there has been no worker for a long time.
        """
        now = monotonic()
        if now >= self._look_again_at or not self._workers:
            self._workers = list(self._client.nthreads())
            self._look_again_at = now + _LOOK_FOR_WORKERS_S
        if self._workers:
            self._seen_at = now
        elif now > self._seen_at + _PATIENCE_S:
            raise ClusterError(
                f"the cluster has had no worker for {_PATIENCE_S:.0f} s; start some and give the same command again"
            )
        return max(1, len(self._workers))

    def _hand_out(self, shards: tuple[int, ...]) -> None:
        machines = Counter(urlsplit(address).hostname for address in self._workers)
        task = replace(self._task, shards=shards, workers_per_machine=max(machines.values(), default=1))
        key = f"actcache-{where(task).replace(' ', '-')}-{uuid.uuid4().hex}"
        future = self._client.submit(make_shards, task, key=key, retries=_RETRIES)
        self._running[key] = future, task
        future.add_done_callback(self._inbox.put)

    def _take(self, message: Any) -> None:
        """Take in a report of a running attempt, or a task that has ended."""
        if isinstance(message, dict):
            self._sums.take(message)
            return
        _, task = self._running.pop(message.key)
        report = self._result_of(message, task)
        self._sums.end(report)
        for said in report["warnings"]:
            # Warnings that differ only in numbers, such as how many values are NaN, are shown once.
            if (known := re.sub(r"[\d,.]+", "", said)) not in self._warned:
                self._warned.add(known)
                warnings.warn(said, stacklevel=5)

    @staticmethod
    def _result_of(future: Future, task: Task) -> Report:
        """The report that the task returned.

        Raises:
            ClusterError: workers died at it, the scheduler is gone, or the last attempt failed in another library.
        """
        from distributed import CancelledError, KilledWorker

        try:
            result: Report = future.result()
        except ActcacheError:
            raise
        except KilledWorker as error:
            raise ClusterError(
                f"{where(task)}: all {error.allowed_failures + 1} workers that tried have died, most likely for lack "
                "of memory; give them more, or take a smaller --batch-sequences, and give the same command again"
            ) from error
        except CancelledError as error:
            raise ClusterError(
                "the scheduler is gone, or has taken the tasks back; once it runs, give the same command again: "
                "what is on disk stays"
            ) from error
        except Exception as error:
            raise ClusterError(f"{where(task)}: {type(error).__name__}: {error}") from error
        return result

    def _others_hold(self, shards: Sequence[int]) -> StoreBusyError:
        names = ", ".join(map(str, shards[:6])) + ", ..." * (len(shards) > 6)
        place = shown(self._task.path)
        return StoreBusyError(
            f"shards {names} of {place} are being made by others, who have finished none for {_PATIENCE_S:.0f} s; if "
            f"these are gone, run 'actcache repair {place} --unlock', and give the same command again"
        )


def _next_group(left: deque[int], n_workers: int) -> tuple[int, ...]:
    """Neighbours from the front of `left`: many at first, single ones at the end, so that workers end together.

    Guided self-scheduling: Polychronopoulos and Kuck, IEEE Transactions on Computers 36 (1987).
    """
    most = min(_MOST_SHARDS, max(1, len(left) // (3 * n_workers)))
    group = [left.popleft()]
    while left and len(group) < most and left[0] == group[-1] + 1:
        group.append(left.popleft())
    return tuple(group)


def seal(path: Objects, check: Check | None) -> Store:
    """The finished store, sealed after this check if the worker that made the last shard has not done so.

    Raises:
        AuditError: what the check raised.
        StoreBusyError: another process is still writing it.
    """
    give_up_at = monotonic() + _PATIENCE_S
    store = open_store(path)
    while not store.sealed:
        with StoreWriter(path, store.spec, None, shared=True) as writer:
            store = writer.finish(check)
        if not store.sealed:
            if monotonic() > give_up_at:
                raise StoreBusyError(
                    f"{path} is complete, but others are still at work in it; once they are done, "
                    "give the same command again"
                )
            sleep(_PAUSE_S)
    return store


def _place_of(path: str | Path) -> str:
    """The place as every process can find it: a URL, or an absolute path."""
    text = str(path)
    return text if "://" in text else str(Path(text).expanduser().absolute())


@contextmanager
def _torch_threads(n: int | None) -> Iterator[None]:
    """While active, use as many threads as the workers will, so that what is measured here holds there."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
