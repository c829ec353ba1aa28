"""What an extraction is going to cost, before it runs: bytes, time, memory, money, and whether it is worth it.

In: a model, a sample of the text's tokens, sites. Out: a `Plan`. A few batches run through the model and are encoded
and read with every preset in a temporary folder; everything else is arithmetic on what was measured there, so one
measurement answers for any number of tokens and of workers.

    amounts.py    how many rows, shards, chunks and objects
    footprint.py  what an extraction holds in memory
    sample.py     a few batches through the model
    measure.py    what the sample costs with every preset
    joint.py      the model and the encoding side by side
    preset.py     bytes, time and money with one preset; when a store pays
    costs.py      all of it
"""

from actcache.estimate.amounts import Amounts
from actcache.estimate.costs import Plan, plan
from actcache.estimate.footprint import Memory
from actcache.estimate.measure import Measured, PresetCosts, SiteCosts
from actcache.estimate.preset import BreakEven, PresetPlan, Terms

__all__ = [
    "Amounts",
    "BreakEven",
    "Measured",
    "Memory",
    "Plan",
    "PresetCosts",
    "PresetPlan",
    "SiteCosts",
    "Terms",
    "plan",
]
