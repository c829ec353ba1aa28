"""Batches as numpy and JAX arrays, in the memory in which the loader made them.

In: a `Loader` on the CPU. Out: iterators of dicts. numpy has no bfloat16: such batches are arrays of the dtype of
ml_dtypes, which JAX and others use too, or their bits as uint16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray

from actcache.errors import ConfigError
from actcache.kernels.bits import tensor_bits

if TYPE_CHECKING:
    import torch

    from actcache.load import Batch

Bfloat16 = Literal["ml_dtypes", "uint16"]
"""How numpy gets bfloat16: as the dtype `ml_dtypes.bfloat16`, or as its bits."""


def as_numpy(tensor: torch.Tensor, bfloat16: Bfloat16 = "ml_dtypes") -> NDArray[Any]:
    """A tensor on the CPU as an array in the same memory, which lives as long as either.

    Raises:
        ConfigError: the tensor is bfloat16 and ml_dtypes is not installed, or it is on another device.
    """
    import torch

    if tensor.device.type != "cpu":
        raise ConfigError(f'numpy arrays share memory with tensors on the CPU, not on {tensor.device}: device="cpu"')
    if tensor.dtype != torch.bfloat16:
        plain: NDArray[Any] = tensor.numpy()
        return plain
    bits = tensor_bits(tensor)
    return bits if bfloat16 == "uint16" else bits.view(_bfloat16_dtype())


def numpy_batches(batches: Iterable[Batch], *, bfloat16: Bfloat16 = "ml_dtypes") -> Iterator[dict[str, NDArray[Any]]]:
    """Each batch as a dict of numpy arrays: `(B, D)` by site and `(B,)` int64 "rows"; no value is copied.

    The arrays may be kept, and modified in place. The state is the loader's: it counts the batches given so far.

    Raises:
        ConfigError: ml_dtypes is needed and not installed, or the loader is not on the CPU.
    """
    for batch in batches:
        yield {name: as_numpy(tensor, bfloat16) for name, tensor in {**batch, "rows": batch.rows}.items()}


def jax_batches(batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
    """Each batch as a dict of JAX arrays `(B, D)` by site, and `(B,)` int64 "rows" as a numpy array.

    The arrays are passed by DLPack, on the loader's device, bfloat16 included. JAX uses the memory as it is if it
    begins at a multiple of 64 bytes, and copies it otherwise. "rows" is a numpy array because JAX has no int64 by
    default.
    """
    from jax import dlpack

    for batch in batches:
        arrays: dict[str, Any] = {name: dlpack.from_dlpack(tensor) for name, tensor in batch.items()}
        yield {**arrays, "rows": batch.rows.numpy()}


def _bfloat16_dtype() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise ConfigError(
            'numpy has no bfloat16 without ml_dtypes: pip install ml_dtypes, take the bits with bfloat16="uint16", '
            "or ask the Loader for dtype=torch.float32"
        ) from None
    return bfloat16
