"""From the model's device into a shard's buffers: only rows that are kept, in reading order, in the store's dtype.

On a GPU values are selected and cast there, and copied to pinned memory on a stream of their own while the model goes
on; on the CPU one copy does it all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actcache.kernels.bits import bits_tensor
from actcache.memory import is_out_of_memory
from actcache.store import ShardBuffers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from actcache.lm import LanguageModel, ResolvedSite


class Sink:
    """Fills one shard's buffers.

    Args:
        buffers: of the shard.
        lengths: `(q,)` tokens of its sequences.
        kept: `(q * rows_per_sequence,)` the only rows to keep, or None for every token after `skip_first`.
    """

    def __init__(self, buffers: ShardBuffers, lengths: NDArray[np.int64], kept: NDArray[np.bool_] | None) -> None:
        spec = self.spec = buffers.spec
        self.lengths, self.buffers = lengths, buffers
        there = np.arange(spec.skip_first, spec.sequence_length) < lengths[:, None]
        self._kept_QR = there if kept is None else there & kept.reshape(there.shape)
        self._starts = np.concatenate([[0], np.cumsum(self._kept_QR.sum(axis=1))])
        self._all = bool(self._kept_QR.all())
        self._targets = {name: bits_tensor(rows, spec.dtype) for name, rows in buffers.rows.items()}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @property
    def n_rows(self) -> int:
        """Rows that the filled buffers have."""
        return int(self._starts[-1])

    @property
    def kept(self) -> NDArray[np.bool_] | None:
        """`(q * rows_per_sequence,)` which rows those are; None for all."""
        return None if self._all else self._kept_QR.reshape(-1)

    def fill(
        self,
        lm: LanguageModel,
        sites: Sequence[ResolvedSite],
        ids: NDArray[np.uint32],
        batch_sequences: int,
        on_batch: Callable[[int, int], None] = lambda n_sequences, n_tokens: None,
    ) -> int:
        """Run the model over the shard's `(q, T)` ids; returns the batch size, which is smaller if memory ran out.

        `on_batch` is called with the sequences and tokens that are done; sequences without rows count no tokens.
        """
        for batch in self._batches(
            batch_sequences, lambda longest: lm.takes_padding_to(self._width(sites, longest), sites)
        ):
            batch_sequences = self._capture(lm, sites, ids, batch, min(batch_sequences, len(batch)), batch_sequences)
            on_batch(len(batch), int(self.lengths[batch].sum()))
        without_rows = int((~self._kept_QR.any(axis=1)).sum())
        if without_rows:
            on_batch(without_rows, 0)
        for stream in self._streams.values():
            stream.synchronize()
        return batch_sequences

    def _batches(self, batch_sequences: int, takes_padding: Callable[[int], bool]) -> Iterator[NDArray[np.int64]]:
        """Batches of the shard's sequences: in order if all are equally long, otherwise longest first.

        Sequences without rows to keep are skipped. If padding is not harmless, a batch has only one length.
        """
        order = np.flatnonzero(self._kept_QR.any(axis=1))
        if len(order) and (self.lengths[order] != self.lengths[order[0]]).any():
            order = order[np.argsort(-self.lengths[order], kind="stable")]
        edges = [0, *(np.flatnonzero(np.diff(self.lengths[order])) + 1).tolist(), len(order)]
        groups = list(pairwise(edges))
        if len(groups) > 1 and takes_padding(int(self.lengths[order[0]])):
            groups = [(0, len(order))]
        for begin, end in groups:
            for start in range(begin, end, batch_sequences):
                yield order[start : min(start + batch_sequences, end)]

    def _capture(
        self,
        lm: LanguageModel,
        sites: Sequence[ResolvedSite],
        ids: NDArray[np.uint32],
        sequences: NDArray[np.int64],
        size: int,
        usual: int,
    ) -> int:
        """Run one batch, halved as long as memory runs out; returns the batch size to go on with."""
        done = 0
        while done < len(sequences):
            part = sequences[done : done + size]
            try:
                self._keep(lm, sites, ids, part)
            except (MemoryError, RuntimeError) as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
                size = usual = max(1, size // 2)
                warnings.warn(f"no memory for so large a batch: going on with {size} sequences at a time", stacklevel=4)
                continue
            done += len(part)
        return usual

    def _keep(
        self, lm: LanguageModel, sites: Sequence[ResolvedSite], ids: NDArray[np.uint32], sequences: NDArray[np.int64]
    ) -> None:
        spec, lengths = self.spec, self.lengths[sequences]
        width = self._width(sites, int(lengths.max()))
        padded = bool((lengths != width).any())
        in_order = self._all and sequences[-1] - sequences[0] == len(sequences) - 1
        for name, acts_QTD in lm.capture(ids[sequences, :width], sites, lengths if padded else None).items():
            target = self._targets[name]
            if in_order:
                begin, end = self._starts[sequences[0]], self._starts[sequences[-1] + 1]
                rows = target[begin:end].view(len(sequences), spec.rows_per_sequence, -1)
                self._copy(rows, acts_QTD[:, spec.skip_first :])
                continue
            for number, sequence in enumerate(sequences.tolist()):
                kept = self._kept_QR[sequence, : width - spec.skip_first]
                values = acts_QTD[number, spec.skip_first :]
                n_kept = int(kept.sum())
                values = values[:n_kept] if kept[:n_kept].all() else values[_as_mask(kept, values)]
                self._copy(target[self._starts[sequence] : self._starts[sequence + 1]], values)

    def _width(self, sites: Sequence[ResolvedSite], longest: int) -> int:
        """Positions of a batch; attention patterns are as wide as the store's sequences, even in shorter ones."""
        return self.spec.sequence_length if any(site.is_pattern for site in sites) else longest

    def _copy(self, target: Tensor, values: Tensor) -> None:
        """Cast and copy; from a GPU the copy is complete when its stream is."""
        import torch

        if values.device.type != "cuda":
            target.copy_(values)
            return
        values = values.to(target.dtype).contiguous()
        stream = self._streams.get(values.device) or torch.cuda.Stream(values.device)  # type: ignore[no-untyped-call]
        self._streams[values.device] = stream
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            target.copy_(values, non_blocking=True)
        values.record_stream(stream)  # its memory is not reused before it is copied


def pinned_for(device: torch.device) -> Callable[[tuple[int, int], np.dtype[Any]], NDArray[Any]] | None:
    """Allocates buffers that this device can copy to while it computes; None for the ordinary way."""
    if device.type != "cuda":
        return None
    import torch

    dtypes = {"uint16": torch.uint16, "float16": torch.float16, "float32": torch.float32}
    return lambda shape, dtype: torch.empty(shape, dtype=dtypes[dtype.name], pin_memory=True).numpy()


def _as_mask(kept: NDArray[np.bool_], like: Tensor) -> Tensor:
    import torch

    return torch.from_numpy(kept).to(like.device)
