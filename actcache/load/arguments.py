"""Checks of what callers pass to loaders and to their consumers.

In: arguments of any kind. Out: values as the rest of `load/` and `share/` expects them, or one sentence about what is
wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actcache.errors import ConfigError, StoreIncompleteError, first_line
from actcache.files import shown
from actcache.spec import check_number, check_positive
from actcache.store import checked_store

if TYPE_CHECKING:
    import torch

ORDERS = ("shuffled", "sequence")
MOST_LANES, _MOST_READ_AHEAD, _MOST_THREADS = 1 << 16, 1 << 16, 1 << 12
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_loader(
    store: Any, order: Any, read_ahead: Any, rank: Any, world_size: Any, optional: Mapping[str, int | None]
) -> None:
    """Check the arguments of `Loader`, and raise the errors that its docstring lists."""
    checked_store(store, "loader")
    if not store.sealed:
        raise StoreIncompleteError(
            f"{store.path} has {len(store.committed)} of {store.spec.n_shards} shards; finish 'actcache extract' first"
        )
    check_positive("loader", world_size=world_size)
    check_number("loader", 1, MOST_LANES, world_size=world_size)
    if type(read_ahead) is not int or not 0 <= read_ahead <= _MOST_READ_AHEAD:
        most = _MOST_READ_AHEAD
        raise ConfigError(f"loader: read_ahead must be an integer from 0 to {most}, got {shown(read_ahead)}")
    if type(rank) is not int or not 0 <= rank < world_size:
        most = world_size - 1
        raise ConfigError(f"loader: rank must be between 0 and world_size - 1 = {most}, got {shown(rank)}")
    for name, number in optional.items():
        if number is not None:
            check_positive("loader", **{name: number})
    limits = {"lanes": MOST_LANES, "threads": _MOST_THREADS}
    for name, most in limits.items():
        check_number("loader", 1, most, **{name: optional.get(name) or 1})
    if order not in ORDERS:
        raise ConfigError(f"loader: order must be one of {', '.join(ORDERS)}, got {shown(order)}")


def check_switch(who: str, name: str, value: Any) -> bool:
    """A value that must be True or False."""
    if not isinstance(value, int) or value not in (0, 1):
        raise ConfigError(f"{who}: {name} must be True or False, got {shown(value)}")
    return bool(value)


def dtype_of(who: str, dtype: Any) -> torch.dtype:
    """A floating-point type of torch, or the name of one; None means float32."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    found = torch.float32 if dtype is None else found
    if str(found).removeprefix("torch.") not in _DTYPES or not isinstance(found, torch.dtype):
        raise ConfigError(f"{who}: dtype must be one of torch's {', '.join(_DTYPES)}, got {shown(dtype)}")
    return found


def device_of(who: str, given: Any) -> torch.device:
    """A device of torch that can be used here."""
    import torch

    try:
        device = torch.device(given)
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = first_line(error)
        named = shown(str(given) if isinstance(given, torch.device) else given)
        raise ConfigError(f"{who}: device {named} cannot be used here ({reason}); try 'cpu'") from error
    return device
