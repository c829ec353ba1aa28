"""What the audit at the end of an extraction costs, as a share of it.

    python benchmarks/audit.py --sequences 3072

The extraction runs without the audit; then the same small audit that would have ended it runs over the store.
"""

from __future__ import annotations

import argparse
import tempfile
from time import perf_counter, process_time

from durability import SITES
from measure import embedded, machine

import actcache as ac
from actcache.auditing import check_before_sealing


def main() -> None:
    """Print a row for 2 and for 8 sites: seconds of each by the clock, and shares by clock and processors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=3072)
    options = parser.parse_args()
    lm, blocks = embedded(options.sequences)
    print(machine(), "| sites | extraction, s | audit, s | share by the clock | by the processors |", sep="\n")
    print("|---|---|---|---|---|")
    for n_sites, patterns in SITES.items():
        with tempfile.TemporaryDirectory(prefix="actcache-bench-") as folder:
            began, busy = perf_counter(), process_time()
            store = ac.extract(lm, blocks, patterns, f"{folder}/acts.zarr", audit=False)
            between, between_busy = perf_counter(), process_time()
            check_before_sealing(lm, "extract")(store)
            audit, audit_busy = perf_counter() - between, process_time() - between_busy
        extraction, extraction_busy = between - began, between_busy - busy
        shares = f"{audit / extraction:.1%} | {audit_busy / extraction_busy:.1%}"
        print(f"| {n_sites} | {extraction:.1f} | {audit:.2f} | {shares} |")


if __name__ == "__main__":
    main()
