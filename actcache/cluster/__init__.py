"""Extraction by many workers: shards are tasks of dask.distributed, and each worker process has its own model.

In: a model that can be opened elsewhere, token blocks, a scheduler's address (or how many processes of this machine).
Out: a sealed store. This is the only room that knows dask.distributed.

Only the store records what is done. A task makes those of its shards that nobody has made or is making, so it may die,
run twice or never return; the driver trusts commit records only, and hands out again the shards that have none.

    driver.py   hands out shards until all are there
    connect.py  a scheduler's address, or workers on this machine, as a client of dask
    worker.py   what runs in the workers
    sums.py     the workers' reports added up
"""

from actcache.cluster.driver import extract_on_cluster

__all__ = ["extract_on_cluster"]
