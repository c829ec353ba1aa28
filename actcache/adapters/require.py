"""What peers silently expect of their data, checked when an adapter is made: before the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache.errors import ConfigError, SiteError

if TYPE_CHECKING:
    from actcache.load import Loader


def one_site(loader: Loader, site: str | None) -> str:
    """The named site, or the loader's only one."""
    has = f"the loader has {', '.join(loader.sites)}"
    if site is None:
        if len(loader.sites) > 1:
            raise ConfigError(f"one site is needed and {has}; name one of them with site=")
        return loader.sites[0]
    if site not in loader.sites:
        raise SiteError(f"site {site!r} was asked for, {has}")
    return site


def endless(loader: Loader, peer: str) -> None:
    """Check that the loader has no end.

    Raises:
        ConfigError: it has a number of epochs.
    """
    if loader.epochs is not None:
        raise ConfigError(
            f"{peer} asks for batches until it has done its number of steps, and this loader ends after epochs="
            f"{loader.epochs} ({loader.epochs * len(loader):,} batches); make it with epochs=None"
        )


def even_batches(loader: Loader, peer: str) -> None:
    """Check that every batch has `batch_rows` rows.

    Raises:
        ConfigError: the last batch of an epoch is smaller.
    """
    rest = loader.n_rows % loader.batch_rows
    if rest and not loader.drop_last:
        raise ConfigError(
            f"{peer} counts samples by the batch, and with drop_last=False the last of each epoch has {rest:,} rows "
            f"where the others have {loader.batch_rows:,}; leave drop_last=True"
        )
