"""Activations from and for other tools: their files -> a store, a store -> their files.

    origin.py       what every importer hands over, and how a store is written from it
    saelens.py      SAELens' cached activations, an Arrow dataset of `datasets`: in and out
    arrays.py       `.npy` files, and safetensors chunks as Llamascopium writes them: in

Nothing is unpickled, and no more than a piece of the files is in memory at a time.
"""

from actcache.exchange.array_files import import_npy, import_safetensors
from actcache.exchange.saelens_cache import export_saelens, import_saelens

__all__ = ["export_saelens", "import_npy", "import_saelens", "import_safetensors"]
