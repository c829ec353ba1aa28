"""Audits: proof that the rows of a store are what its model computes for their tokens.

In: a store and the model that it was made from. Out: an `Audit`, one row a site. Checksums say that the bytes are those
that were written; an audit says that what was written is what the name of the site means, row by row. It runs some
sequences alone through the whole plain model, reads the modules that the store names with plain torch hooks, and
compares. Nothing here uses the code that captured the values: no batches, no padding, no early exit, no layouts.

    draw.py       which sequences are looked at, and their rows in the store
    reference.py  what the model computes for one sequence, by module or by hook name of transformer-lens
    compare.py    the difference between rows, the tolerance, and what the difference looks like
    result.py     Audit and SiteAudit
    check.py      `audit`, and the small audit that ends an extraction
"""

from actcache.auditing.check import audit, check_before_sealing, small_audit_size
from actcache.auditing.result import Audit, SiteAudit

__all__ = ["Audit", "SiteAudit", "audit", "check_before_sealing", "small_audit_size"]
