"""What an extraction holds in memory. In: a model, sizes. Out: bytes by purpose, none of which grows with the text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.estimate.amounts import Amounts, Asked
from actcache.spec import DTYPE_BYTES
from actcache.store.writing.buffers import N_BUFFERS

if TYPE_CHECKING:
    from actcache.lm import LanguageModel

_RESERVE = 4 / 3
"""Most that an allocator takes, relative to what is needed, because it cannot reuse all that was freed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes at the peak, by purpose.

    `buffers = min(2, shards) * rows per shard * bytes of a row at all sites`: one shard is filled while the other is
    encoded. `encoders = threads * (for each width: a chunk as it is shuffled, and half of that as int8; and an encoded
    chunk of the widest)`. The others were measured. An allocator takes more, because it cannot reuse all that was
    freed: `total_range` has a third in reserve.
    """

    process: int
    """The interpreter, its libraries and the text, without the weights."""
    weights: int
    """Parameters and buffers of the model."""
    batch: int
    """A batch: its activations at all sites, and what the forward pass holds between them."""
    batch_range: tuple[int, int]
    """The same for the batches of the sample that took the least and the most."""
    buffers: int
    """Shards of all sites."""
    encoders: int
    """Memory that the encoding threads keep."""
    model_on_device: bool
    """Whether weights and batch are in the memory of another device, not in that of the machine."""

    @property
    def total(self) -> int:
        """Memory of the machine that is needed."""
        return self._total(self.batch)

    @property
    def total_range(self) -> tuple[int, int]:
        """The same with the smallest batch of the sample; and with the largest, plus a third for the allocator."""
        low, high = (self._total(batch) for batch in self.batch_range)
        return low, round(_RESERVE * high)

    def _total(self, batch: int) -> int:
        on_machine = 0 if self.model_on_device else self.weights + batch
        return self.process + self.buffers + self.encoders + on_machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """The part of the memory that does not depend on the sizes of a store."""

    process: int
    """The interpreter, its libraries and the text."""
    weights: int
    """Parameters and buffers of the model."""
    batch_per_sequence: float
    """Bytes of a batch per sequence; on another device only those of its activations at the sites."""
    batch_per_sequence_range: tuple[float, float]
    """The same for the batches that took the least and the most."""
    on_device: bool
    """Whether the model is on another device."""


def host_of(
    lm: LanguageModel, asked: Asked, *, before: int, after: int, after_range: tuple[int, int], n_sequences: int
) -> Host:
    """Computed from the memory of this process before and after it ran batches of `n_sequences`."""
    weights = sum(t.numel() * t.element_size() for t in chain(lm.module.parameters(), lm.module.buffers()))
    activations = asked.sequence_length * sum(asked.sites.values()) * lm.dtype.itemsize
    on_device = lm.device.type != "cpu"
    typical, low, high = (
        activations if on_device else max(activations, (then - before) / n_sequences) for then in (after, *after_range)
    )
    return Host(
        process=before if on_device else max(0, before - weights),
        weights=weights,
        batch_per_sequence=typical,
        batch_per_sequence_range=(low, high),
        on_device=on_device,
    )


def memory_of(host: Host, asked: Asked, amounts: Amounts, batch_sequences: int) -> Memory:
    """Memory of an extraction of these sizes, by the formulas of `Memory`."""
    rows_per_shard = amounts.sequences_per_shard * (asked.sequence_length - asked.options.skip_first)
    chunks = [amounts.rows_per_chunk * width * DTYPE_BYTES[asked.dtype] for width in set(asked.sites.values())]
    n_sequences = min(batch_sequences, amounts.sequences_per_shard)
    low, high = host.batch_per_sequence_range
    return Memory(
        process=host.process,
        weights=host.weights,
        batch=round(n_sequences * host.batch_per_sequence),
        batch_range=(round(n_sequences * low), round(n_sequences * high)),
        buffers=min(N_BUFFERS, amounts.n_shards) * rows_per_shard * asked.row_bytes,
        encoders=asked.threads * _encoder_bytes(chunks),
        model_on_device=host.on_device,
    )


def _encoder_bytes(chunks: Iterable[int]) -> int:
    chunks = list(chunks)
    return sum(n_bytes + n_bytes // 2 for n_bytes in chunks) + max(chunks)


def resident_bytes() -> int:
    """Memory of this process now; its peak if the system does not tell that."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return 1024 * int(line.split()[1])
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
