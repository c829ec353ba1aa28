"""Run the base model over token blocks and keep the activations: tokens x model -> a sealed store.

Work is done shard by shard, and a shard is a function of its own sequences only. So a run that was killed is continued
by the same call: shards that are committed stay, the others are made, and the bytes are those of an unbroken run. For
the same reason several processes can fill one store, each some of its shards.

    entry.py    extract, extend, add_sites; begin and fill, for many processes
    settle.py   decisions before the first pass: spec, codecs, batch size, provenance
    run.py      the loop: the forward pass on this thread, encoding and disk behind it
    sink.py     from the model's device into a shard's buffers
    follow.py   progress, speed, and warnings about the activations

The room has the verb's noun for its name, because importing a module `actcache.extract` would replace the function of
that name on the package.
"""

from actcache.extraction.entry import add_sites, begin, extend, extract, fill
from actcache.extraction.settle import BatchSequences, store_spec

__all__ = ["BatchSequences", "add_sites", "begin", "extend", "extract", "fill", "store_spec"]
