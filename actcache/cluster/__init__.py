"""Extraction by many workers: shards as tasks of dask.distributed, in each worker process a model of its own.

In: a model that can be opened elsewhere, token blocks, a scheduler's address (or how many processes of this machine).
Out: a sealed store. This is the only room that knows dask.distributed.

What is done stands in the store alone. A task makes those of its shards that nobody has made or is making, so it may
die, come twice or never come back; the driver believes commit records only, and hands out again what has none.

    driver.py   hands out shards until all are there
    connect.py  a scheduler's address, or workers on this machine, as a client of dask
    worker.py   what runs in the workers
    sums.py     the workers' reports added up
"""

from actcache.cluster.driver import extract_on_cluster

__all__ = ["extract_on_cluster"]
