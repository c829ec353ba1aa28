"""Reading a store, from its root to single rows."""
