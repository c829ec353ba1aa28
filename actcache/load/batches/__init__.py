"""Batches: rows gathered out of windows, in an order that only integers decide."""
