"""One process of `torch.distributed`: loads its share of the batches; the first one writes down who had which rows."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from actcache.load import Loader
from actcache.store import open_store

job = json.loads(sys.argv[1])
folder, rank, world_size = Path(job["folder"]), job["rank"], job["world_size"]
dist.init_process_group(
    "gloo",
    init_method=f"file://{folder / 'meeting'}",
    rank=rank,
    world_size=world_size,
    timeout=timedelta(minutes=10),
)
store = open_store(job["store"])
loader = Loader(
    store,
    store.sites[:1],
    batch_rows=32,
    seed=3,
    drop_last=False,
    threads=1,
    rank=dist.get_rank(),
    world_size=dist.get_world_size(),
)
with loader:
    if job["state"] is not None:
        loader.load_state_dict(json.loads(Path(job["state"]).read_text()))
    rows = [batch.rows.tolist() for batch in islice(iter(loader), job["n_batches"])]
    states = [None] * world_size
    dist.all_gather_object(states, loader.state_dict())
    assert all(state == states[0] for state in states)
got = [None] * world_size
dist.all_gather_object(got, rows)
if rank == 0:
    (folder / "got.json").write_text(json.dumps(got))
    (folder / "state.json").write_text(json.dumps(states[0]))
dist.destroy_process_group()
