"""actcache: cache, store and serve neural-network activations.

Run a base language model once, keep chosen activations in a compressed, checked, plain Zarr store, and feed them,
shuffled and exactly resumable, to any trainer. Everything public is here; heavy libraries load with the name that needs
them, so `import actcache` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache._lazy import import_when_used
from actcache._version import __version__ as __version__

if TYPE_CHECKING:
    from actcache.auditing import Audit as Audit
    from actcache.auditing import audit as audit
    from actcache.errors import ActcacheError as ActcacheError
    from actcache.exchange import export_saelens as export_saelens
    from actcache.exchange import import_npy as import_npy
    from actcache.exchange import import_saelens as import_saelens
    from actcache.exchange import import_safetensors as import_safetensors
    from actcache.extraction import add_sites as add_sites
    from actcache.extraction import extend as extend
    from actcache.extraction import extract as extract
    from actcache.lm import load_lm as load_lm
    from actcache.load import Loader as Loader
    from actcache.load import LoaderStats as LoaderStats
    from actcache.load import MixedLoader as MixedLoader
    from actcache.load import ShuffleReport as ShuffleReport
    from actcache.load import split_sequences as split_sequences
    from actcache.report import write_report as write_report
    from actcache.share import ServedBatches as ServedBatches
    from actcache.share import serve_batches as serve_batches
    from actcache.share import share_batches as share_batches
    from actcache.source import read_chats as read_chats
    from actcache.source import read_documents as read_documents
    from actcache.source import read_texts as read_texts
    from actcache.source import read_tokens as read_tokens
    from actcache.source import token_blocks as token_blocks
    from actcache.sparse.evaluation import reconstruction as reconstruction
    from actcache.sparse.evaluation import spliced_loss as spliced_loss
    from actcache.sparse.model import SparseMLP as SparseMLP
    from actcache.sparse.training import TrainConfig as TrainConfig
    from actcache.sparse.training import Trainer as Trainer
    from actcache.store import Context as Context
    from actcache.store import RowFilter as RowFilter
    from actcache.store import Store as Store
    from actcache.store import delete_sites as delete_sites
    from actcache.store import export as export
    from actcache.store import open_store as open_store
    from actcache.store import repair as repair
    from actcache.store import verify as verify

_ROOMS = {
    "ActcacheError": "errors",
    "Audit": "auditing",
    "Context": "store",
    "Loader": "load",
    "LoaderStats": "load",
    "MixedLoader": "load",
    "RowFilter": "store",
    "ServedBatches": "share",
    "ShuffleReport": "load",
    "SparseMLP": "sparse",
    "Store": "store",
    "TrainConfig": "sparse",
    "Trainer": "sparse",
    "add_sites": "extraction",
    "audit": "auditing",
    "delete_sites": "store",
    "export": "store",
    "export_saelens": "exchange",
    "extend": "extraction",
    "extract": "extraction",
    "import_npy": "exchange",
    "import_saelens": "exchange",
    "import_safetensors": "exchange",
    "load_lm": "lm",
    "open_store": "store",
    "read_chats": "source",
    "read_documents": "source",
    "read_texts": "source",
    "read_tokens": "source",
    "reconstruction": "sparse",
    "repair": "store",
    "serve_batches": "share",
    "share_batches": "share",
    "spliced_loss": "sparse",
    "split_sequences": "load",
    "token_blocks": "source",
    "verify": "store",
    "write_report": "report",
}

__all__ = sorted(_ROOMS)


__getattr__ = import_when_used(__name__, _ROOMS)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
