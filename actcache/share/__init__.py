"""One loader, many consumers: a sweep on one machine reads and decodes once.

`threads` shares a loader within a process; `server` and `client` share it between processes, with batches in
`shared_memory`, `messages` on a socket, and the socket's file in `listen`; `copies` gives each consumer its own batch.
"""

from actcache.share.client import ServedBatches
from actcache.share.server import exact_dtype, serve_batches
from actcache.share.threads import SharedBatches, share_batches

__all__ = ["ServedBatches", "SharedBatches", "exact_dtype", "serve_batches", "share_batches"]
