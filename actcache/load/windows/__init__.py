"""Windows: many chunks decoded into one memory, from which batches are gathered."""
