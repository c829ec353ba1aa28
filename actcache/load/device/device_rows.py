"""Windows on a GPU or another device, and batches made of them there.

In: chunks as threads decode them, in the stored dtype. Out: batches, gathered, multiplied by their scales, normalised
and cast on the device. Nothing is copied back to the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actcache.load.device.link import DeviceLink
from actcache.load.device.streams import Step
from actcache.store.codecs import quantiser_of
from actcache.store.format.site_arrays import arrays_of, powers_of

if TYPE_CHECKING:
    import torch

    from actcache.load.normalize import Normalization
    from actcache.spec import StoreSpec


class DeviceGather:
    """Takes rows of windows on a device, multiplied out, normalised and cast: to the same bits as `Gather` on the CPU.

    Rows are gathered for each batch. The alternative, to permute a window once so that batches are slices of it, does
    not move fewer bytes: rows are read and written for the permutation and read again for the batch, which needs its
    own memory; that is twice as many bytes if nothing is done to the values. It also takes a third window.

    Each step rounds to float32, and the last one to the dtype of the batch, as on the CPU; torch's kernels for mixed
    dtypes widen what they read and narrow what they write in the same pass.
    """

    def __init__(
        self,
        link: DeviceLink,
        spec: StoreSpec,
        sites: list[str],
        out: torch.dtype,
        normalization: Mapping[str, Normalization],
    ) -> None:
        self.link, self.spec, self.sites, self._out = link, spec, sites, out
        self._steps = {site: self._steps_of(site, normalization.get(site)) for site in sites}
        self._quantisers = {site: quantiser_of(spec.site(site).codec) for site in sites}

    def window(self, n_rows: int) -> DeviceWindow:
        """An empty window of `n_rows` rows."""
        return DeviceWindow(self, n_rows)

    def take(self, parts: Sequence[torch.Tensor], places: torch.Tensor, site: str, target: torch.Tensor) -> None:
        """`target[i]` = row `places[i]` of the site, `(B, D)`, with what is done to it; `parts` are its arrays."""
        import torch

        steps, quantiser = self._steps[site], self._quantisers[site]
        if quantiser is not None:
            rows, joining = quantiser.device_steps([part.index_select(0, places) for part in parts], target.shape[1])
            steps = [*joining, *steps]
        elif not steps and parts[0].dtype == self._out:
            torch.index_select(parts[0], 0, places, out=target)
            return
        else:
            rows = parts[0].index_select(0, places)
        for operation, operand in steps[:-1]:
            rows = operation(rows, operand)
        if steps:
            operation, operand = steps[-1]
            operation(rows, operand, out=target)
        else:
            target.copy_(rows)

    def _steps_of(self, site: str, done: Normalization | None) -> list[Step]:
        """What is done to the rows of a site, once a quantiser has joined them."""
        import torch

        steps, powers = [], powers_of(self.spec.site(site))
        if powers is not None:
            steps.append((torch.mul, self._sent(powers)))
        if done is not None and done.mean is not None:
            steps.append((torch.sub, self._sent(done.mean)))
        if done is not None:
            steps.append((torch.mul, self._sent(np.array([done.scale], np.float32))))
        return steps

    def _sent(self, values: NDArray[np.float32]) -> torch.Tensor:
        import torch

        there = self.link.gathers.empty(values.shape, torch.float32)
        self.link.gathers.run(lambda: there.copy_(torch.from_numpy(values)))
        return there


class DeviceWindow:
    """A window's rows on a device: `rows[site, array]`, as stored, and the order in which they are taken."""

    def __init__(self, gather: DeviceGather, n_rows: int) -> None:
        import torch

        self._gather, self.link = gather, gather.link
        self._places = self.link.window_memory((n_rows,), torch.int64)
        self.rows: dict[tuple[str, str], torch.Tensor] = {}
        self._parts: dict[str, list[torch.Tensor]] = {}
        for site in map(gather.spec.site, gather.sites):
            arrays = arrays_of(gather.spec, site)
            for array in arrays:
                shape, dtype = (n_rows, *array.row_shape), getattr(torch, array.element)
                self.rows[site.name, array.name] = self.link.window_memory(shape, dtype)
            self._parts[site.name] = [self.rows[site.name, array.name] for array in arrays]

    def send_order(self, order: NDArray[np.int64]) -> None:
        """Send the places of the rows, in the order in which batches take them."""
        import torch

        self.link.send(torch.from_numpy(order), self._places[: len(order)])

    def take(self, first: int, targets: Mapping[str, torch.Tensor]) -> None:
        """Fill each site's target `(B, D)` with the rows from place `first` of the order on."""

        def work() -> None:
            for site, target in targets.items():
                places = self._places[first : first + len(target)]
                self._gather.take(self._parts[site], places, site, target)

        self.link.gathers.run(work)
