"""What peers silently expect of their data, checked where an adapter is made: the error comes before the training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actcache.errors import ConfigError, SiteError

if TYPE_CHECKING:
    from actcache.load import Loader


def one_site(loader: Loader, site: str | None) -> str:
    """The site that is meant: the named one, or the loader's only one."""
    has = f"the loader has {', '.join(loader.sites)}"
    if site is None:
        if len(loader.sites) > 1:
            raise ConfigError(f"one site is needed and {has}; name one of them with site=")
        return loader.sites[0]
    if site not in loader.sites:
        raise SiteError(f"site {site!r} was asked for, {has}")
    return site


def endless(loader: Loader, peer: str) -> None:
    """The loader goes on for as long as it is asked.

    Raises:
        ConfigError: its epochs are counted.
    """
    if loader.epochs is not None:
        raise ConfigError(
            f"{peer} asks for batches until it has had its number of steps, and this loader ends after epochs="
            f"{loader.epochs} ({loader.epochs * len(loader):,} batches); make it with epochs=None"
        )


def even_batches(loader: Loader, peer: str) -> None:
    """Every batch has `batch_rows` rows.

    Raises:
        ConfigError: the last batch of an epoch is smaller.
    """
    rest = loader.plan.n_rows % loader.batch_rows
    if rest and not loader.plan.drop_last:
        raise ConfigError(
            f"{peer} counts samples by the batch, and with drop_last=False the last of each epoch has {rest:,} rows "
            f"where the others have {loader.batch_rows:,}; leave drop_last=True"
        )
