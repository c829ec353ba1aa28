"""Activations from and for other tools: their files -> a store, a store -> their files.

    foreign.py         what every importer provides, and how a store is written from it
    saelens_cache.py   SAELens' cached activations, an Arrow dataset of `datasets`: in and out
    array_files.py     `.npy` files, and safetensors chunks as Llamascopium writes them: in

Nothing is unpickled, and only one piece of the files is in memory at a time.
"""

from actcache.exchange.array_files import import_npy, import_safetensors
from actcache.exchange.saelens_cache import export_saelens, import_saelens

__all__ = ["export_saelens", "import_npy", "import_saelens", "import_safetensors"]
