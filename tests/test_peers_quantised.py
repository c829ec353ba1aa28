"""Models in 8 bits, with bitsandbytes in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest

pytestmark = pytest.mark.exhaustive


def test_model_in_8_bits(tmp_path: Path) -> None:
    name = "test_model_in_8_bits"
    peers.Results([f"test_lm_running.py::{name}"], ["bitsandbytes"], tmp_path).check(name)
