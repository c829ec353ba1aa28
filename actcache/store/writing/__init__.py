"""Writing a store, shard by shard."""
