"""Windows and batches on another device than the processor."""
