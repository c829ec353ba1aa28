"""Models in 8 bits, with bitsandbytes in an environment of its own."""

from __future__ import annotations

from pathlib import Path

import peers
import pytest

pytestmark = pytest.mark.exhaustive


def test_model_in_8_bits(tmp_path: Path) -> None:
    peers.Results(["test_lm_running.py::test_model_in_8_bits"], ["bitsandbytes"], tmp_path).check("test_model_in_8_bits")
