"""The model and the encoding side by side: how much they slow each other down."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from actcache.estimate.sample import Sample
from actcache.spec import Site
from actcache.store import Objects, ShardEncoder

_ALONE = 2
"""Batches without encoding beside them, before and after."""


def contention(
    sample: Sample,
    sites: Sequence[Site],
    encode_s_per_row: Mapping[str, float],
    folder: Path,
    threads: int,
    seconds: float,
    n_batches: int,
) -> float:
    """How long a second of encoding delays the model, measured while all threads encode without a pause.

    The model runs for `seconds`, and over at least `n_batches`.

    In a window of W seconds the model runs f tokens, and the threads do work that takes e seconds on an idle machine.
    With F seconds a token for the model alone, measured just before and after, `W = f * F + e * kappa`.
    """
    spec, order, over = replace(sample.spec, sites=tuple(sites)), sample.order, threading.Event()
    # With memory of its own: the rows being encoded must not change while the model runs.
    model = Sample(sample.lm, sample.blocks, sample.sites, sample.spec, sample.batch_sequences, sample.batch_sequences)
    alone = [model.run() for _ in range(_ALONE)]

    def encode(thread: int) -> list[tuple[float, float, float]]:
        """Begin, end and cost of all that this thread encodes until the model is done."""
        encoder, done = ShardEncoder(Objects(folder / str(thread), read_only=False), spec), []
        while not over.is_set():
            for site in sites:
                began = perf_counter()
                encoder.write(site, 0, sample.rows(site.name), order)
                done.append((began, perf_counter(), encode_s_per_row[site.name] * sample.n_rows))
        return done

    n_done = 0
    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(encode, thread) for thread in range(threads)]
        began = perf_counter()
        try:
            while n_done < n_batches or perf_counter() - began < seconds:
                model.run()
                n_done += 1
        finally:
            ended = perf_counter()
            over.set()
        encoded = [piece for future in running for piece in future.result()]
    alone += [model.run() for _ in range(_ALONE)]
    work = sum(cost * max(0.0, min(end, ended) - max(start, began)) / (end - start) for start, end, cost in encoded)
    delayed = (ended - began) - n_done * float(np.median(alone))
    return max(0.0, delayed / work) if work else 0.0
