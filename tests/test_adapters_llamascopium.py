"""Our loader as Llamascopium's activation stream: its own Initializer and Trainer run beside, where it is installed."""

from __future__ import annotations

import peers
import pytest
import torch

from actcache.adapters.llamascopium import ActivationStream
from actcache.errors import ConfigError, SiteError
from actcache.load import Loader

TRAINS = "peers/llamascopium_trains.py"
SITE = "blocks.0.hook_mlp_out"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> peers.Results:
    return peers.Results([TRAINS], ["llamascopium"], tmp_path_factory.mktemp("llamascopium"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", peers.tests_in(TRAINS))
def test_llamascopium(results: peers.Results, name: str) -> None:
    results.check(name)


def test_what_the_loader_does_to_the_rows_is_in_the_norms_that_are_given(small_store):
    for settings in ({}, {"normalize": "rms"}, {"rows": range(60, 170)}):
        loader = Loader(small_store, [SITE], batch_rows=50, drop_last=False, **settings)
        delivered = torch.cat([batch[SITE] for batch in loader])
        norm = ActivationStream(loader).activation_norm()
        assert norm == {SITE: pytest.approx(delivered.norm(dim=1).mean().item(), rel=1e-5)}
    with pytest.raises(ConfigError, match=r"centres .* leave activation_norm to Initializer"):
        ActivationStream(Loader(small_store, [SITE], batch_rows=50, normalize="center")).activation_norm()


def test_hook_points_are_those_of_the_loader(small_store):
    with pytest.raises(SiteError, match=r"no site 'blocks\.9\.hook_z' \(for 'out'\) in the loader; there are blocks"):
        ActivationStream(Loader(small_store, [SITE], batch_rows=50), {"in": SITE, "out": "blocks.9.hook_z"})
