"""What an audit found: one row a site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteAudit:
    """The comparison of one site's rows with what the model computes."""

    site: str
    """Its name."""
    reference: str
    """Where the values to compare with come from."""
    n_rows: int
    """Rows that were compared: all that the store has of the sequences drawn."""
    max_relative_error: float
    """Largest `|stored - model| / |model|` of a row, minus what its codec may do to each value."""
    tolerance: float
    """How large it may be: rounding in the model's dtype, and in the store's."""
    worst: Mapping[str, int] | None
    """`sequence`, `position` and `token` of the row with that error; None where no row was compared."""
    reasons: tuple[str, ...] = ()
    """What a difference looks like, most telling first."""

    @property
    def sound(self) -> bool:
        """Whether every row that was compared is within the tolerance."""
        return self.max_relative_error <= self.tolerance


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Whether the audited rows of a store are what its model computes.

    Examples:
        >>> found = ac.audit(store, lm, n_sequences=2)
        >>> [(site.site, site.n_rows, site.max_relative_error < site.tolerance) for site in found.sites]
        [('blocks.3.mlp.hook_in', 126, True), ('blocks.3.hook_mlp_out', 126, True)]
        >>> found.failed
        []
    """

    path: str
    """Path of the store."""
    sites: tuple[SiteAudit, ...]
    """The result of each site."""
    sequences: tuple[int, ...]
    """Numbers of the sequences that were run."""
    seed: int
    """Seed with which they were drawn."""
    model: str
    """The model's name."""
    dtype: str
    """Element type in which it computed."""
    device: str
    """Device on which it ran."""

    @property
    def sound(self) -> bool:
        """Whether every site is sound."""
        return all(site.sound for site in self.sites)

    @property
    def failed(self) -> list[SiteAudit]:
        """The sites that are not sound."""
        return [site for site in self.sites if not site.sound]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        sites = [{**asdict(site), "reasons": list(site.reasons), "sound": site.sound} for site in self.sites]
        return {**asdict(self), "sites": sites, "sequences": list(self.sequences), "sound": self.sound}

    def to_entry(self, of: str) -> dict[str, Any]:
        """The entry in a store's provenance: a line for each site, and what work was audited."""
        sites = {
            site.site: {
                "sound": site.sound,
                # JSON has no infinity; without a comparison there is no number.
                "max_relative_error": site.max_relative_error if isfinite(site.max_relative_error) else None,
                "tolerance": site.tolerance,
                "n_rows": site.n_rows,
                "reference": site.reference,
                **({} if site.sound else {"worst": site.worst, "reasons": list(site.reasons)}),
            }
            for site in self.sites
        }
        return {"of": of, "sound": self.sound, "n_sequences": len(self.sequences), "seed": self.seed, "sites": sites}

    def __str__(self) -> str:
        verdict = "sound" if self.sound else "NOT SOUND"
        lines = [f"Audit of {self.path} with {self.model} ({self.dtype}): {verdict}, {len(self.sequences)} sequences"]
        return "\n".join([*lines, *map(describe_site, self.sites)])


def describe_site(site: SiteAudit) -> str:
    """A site's result as a sentence."""
    mark = "ok  " if site.sound else "FAIL"
    error = f"{site.max_relative_error:.2g} of {site.tolerance:.2g} allowed"
    where = "" if site.worst is None or site.sound else f", worst at {said_of(site.worst)}"
    return f"{mark} {site.site}: {error}, {site.n_rows:,} rows{where}, {site.reference}" + "".join(
        f"\n     {reason}" for reason in site.reasons
    )


def said_of(worst: Mapping[str, int]) -> str:
    """A row's place in words."""
    return "sequence {sequence}, position {position}, token {token}".format(**worst)
