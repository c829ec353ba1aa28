"""Format 1 on disk: which arrays there are, under which keys, with which codecs; and the commit record.

    NAME.zarr/                      attributes.actcache = what `Root.attributes` says
    ├── tokens/{ids, document}      (Q, T) uint32     a store is born with its tokens, in extraction order
    ├── rows/{sequence, position, token}  (N,) uint32 where each row came from; one chunk a shard
    ├── rows/commit                 (S, L) uint8      one record a shard
    ├── sites/<hook>/acts           (N, D)            one sharded object a shard
    ├── sites/<hook>/scale          (N,) uint16       of quantised sites: one scale a row, sharded like `acts`
    ├── sites/<hook>/stats          (S, 3 D + 6)      one line a shard, see `stats.py`
    ├── sites/<hook>/commit         (S, L) uint8      one record a shard; a shard counts iff all its records are there
    ├── sites/<hook>/total          (3 D + 6,)        the merged line, written when the store is sealed
    └── ledger                      (S, C, 48) uint8  all records' heads in one object, written when the store is sealed

Columns are `rows` and then the sites. Every chunk of every array ends in a crc32c; a commit record lists those
checksums, so a chunk that is whole but belongs somewhere else is noticed too. Chunk keys have dots (`c.17.0`), so that
a folder of ten thousand shards is one folder.
"""
