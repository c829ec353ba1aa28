"""How the process keeps memory: the first touch of fresh pages costs several times a copy, so freed blocks are kept."""

from __future__ import annotations


def keep_freed_memory() -> None:
    """Make the C allocator keep a loop's large tensors instead of giving their pages back and faulting them in again.

    Freeing a block raises glibc's mmap threshold to its size, 32 MiB at most (mallopt(3), M_MMAP_THRESHOLD).
    """
    import torch

    torch.empty(31 << 20, dtype=torch.uint8)
