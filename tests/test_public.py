"""The public door: sorted, complete, light."""

from __future__ import annotations

import subprocess
import sys

import actcache


def test_names_are_sorted_and_all_there():
    assert actcache.__all__ == sorted(actcache.__all__)
    assert set(actcache.__all__) == set(actcache._ROOMS)
    for name in actcache.__all__:
        assert getattr(actcache, name).__doc__


def test_import_is_light_and_silent():
    code = (
        "import sys; before = set(sys.modules); import actcache; loaded = set(sys.modules) - before;"
        "heavy = {'torch', 'numpy', 'zarr', 'datasets', 'transformers', 'matplotlib'} & loaded;"
        "print(heavy, len(loaded) < 20)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set() True"
    assert done.stderr == ""


def test_a_room_pays_only_for_what_it_needs():
    code = "import sys; from actcache import Loader; print({'datasets', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_public_name_is_hidden_by_a_room():
    """Importing `actcache.x` binds `x` on the package, so no public function may share a room's name."""
    import pkgutil

    rooms = {module.name for module in pkgutil.iter_modules(actcache.__path__)}
    assert not rooms & set(actcache.__all__)
