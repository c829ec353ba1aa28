"""What other tools' files can look like: each way ends in a store, or in one sentence, and never in a traceback."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from conftest import small_disk_in
from safetensors.torch import save_file
from test_exchange import MLP, RESID, saelens_cache, token_ids, values_of

from actcache.cli import main
from actcache.errors import ActcacheError, ConfigError, StorageFullError
from actcache.exchange import export_saelens, import_npy, import_saelens, import_safetensors

DATA = "data-00000-of-00002.arrow"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    acts = {RESID: values_of(RESID), MLP: values_of(MLP)}
    return saelens_cache(tmp_path_factory.mktemp("damage") / "cache", acts, token_ids(), num_shards=2)


def wrote(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def of_feature(**changes: Any) -> Callable[[Path], None]:
    return edited("dataset_info.json", lambda info: info["features"][MLP].update(changes))


def of_state(**changes: Any) -> Callable[[Path], None]:
    return edited("state.json", lambda state: state.update(changes))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no data": (lambda folder: (folder / DATA).unlink(), "names 'data-00000"),
    "empty data": (wrote(DATA, b""), "is damaged"),
    "garbage data": (wrote(DATA, bytes(range(256)) * 20), "is damaged"),
    "half the data": (lambda folder: (folder / DATA).write_bytes((folder / DATA).read_bytes()[:900]), "is damaged"),
    "nearly all data": (lambda folder: (folder / DATA).write_bytes((folder / DATA).read_bytes()[:-700]), "is damaged"),
    "a pointer": (wrote(DATA, LFS), "is damaged"),
    "no state": (lambda folder: (folder / "state.json").unlink(), r"there is no state\.json"),
    "garbage state": (wrote("state.json", b"{nope"), r"state\.json is not valid JSON"),
    "binary state": (wrote("state.json", bytes(range(128, 256))), r"state\.json is not valid JSON"),
    "deep state": (wrote("state.json", DEEP), r"state\.json is nested too deep"),
    "a pointer to a state": (wrote("state.json", LFS), "git lfs pull"),
    "a list for a state": (wrote("state.json", b"[]"), "should be a JSON object"),
    "no files in the state": (of_state(_data_files=[]), "names no files of data"),
    "text for files": (of_state(_data_files="x"), "names no files of data"),
    "files elsewhere": (of_state(_data_files=[{"filename": f"../cache/{DATA}"}]), "not a file in that folder"),
    "files of the system": (of_state(_data_files=[{"filename": "/etc/passwd"}]), "not a file in that folder"),
    "numbers for files": (of_state(_data_files=[{"filename": 5}, 6]), "not a file in that folder"),
    "a strange format": (of_state(_format_type="pickle"), "is damaged"),
    "no info": (lambda folder: (folder / "dataset_info.json").unlink(), r"there is no dataset_info\.json"),
    "deep info": (wrote("dataset_info.json", DEEP), "nested too deep"),
    "no such feature": (of_feature(_type="Array9D"), "is damaged"),
    "another width": (of_feature(shape=[7, 4]), "not all of shape"),
    "a huge width": (of_feature(shape=[7, 10**12]), "not all of shape"),
    "a negative length": (of_feature(shape=[-7, 3]), r"different lengths|fixed number"),
    "another dtype": (of_feature(dtype="int8"), "is damaged"),
    "a column more": (edited("dataset_info.json", lambda info: info["features"].update(x=info["features"][MLP])), "is"),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), r"there is no state\.json"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), r"there is no state\.json"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_saelens_folder_is_one_sentence_and_makes_nothing(cache, tmp_path, damage, message, capsys):
    folder, out = tmp_path / "folder", tmp_path / "x.zarr"
    shutil.copytree(cache, folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        import_saelens(folder, out)
    assert "\n" not in str(caught.value)
    assert "folder" in str(caught.value)
    assert not out.exists()
    capsys.readouterr()
    assert main(["import", str(folder), "--format", "saelens", "--out", str(out)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Traceback" not in shown.err


def test_flipped_bits_of_a_saelens_folder_never_end_in_a_traceback(cache, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(cache, folder)
    rng = np.random.default_rng(0)
    for file in sorted(folder.iterdir()):
        sound = file.read_bytes()
        for trial in range(12):
            bits = bytearray(sound)
            for place in rng.integers(0, len(bits), 2):
                bits[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(bits)
            out = tmp_path / f"{file.name}-{trial}.zarr"
            try:
                import_saelens(folder, out)
            except ActcacheError as error:
                assert "\n" not in str(error)  # noqa: PT017  # either is right
        file.write_bytes(sound)


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(header)) + header + data


NPY = {
    "nothing": b"",
    "text": b"1, 2, 3",
    "a pointer": LFS,
    "half a header": npy(b"{'descr': '<f4', ")[:12],
    "a header that is code": npy(b"__import__('os').system('true')"),
    "a deep header": npy(b"(" * 5000),
    "a long header": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + b"1," * 9000 + b")}"),
    "no dictionary": npy(b"7"),
    "other keys": npy(b"{'descr': '<f4'}"),
    "a huge shape": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999, 9)}"),
    "a shape beyond the file": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 9)}", bytes(40)),
    "a negative shape": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-3, 9)}", bytes(400)),
    "a shape of text": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': 'ab'}", bytes(400)),
    "objects": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", pickle.dumps([1, 2, 3])),
    "fields": npy(b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 2)}", bytes(24)),
    "a strange type": npy(b"{'descr': 'Q9', 'fortran_order': False, 'shape': (3, 2)}", bytes(400)),
    "a version of the future": npy(b"{}", version=b"\x09\x00"),
    "whole numbers": npy(b"{'descr': '<i4', 'fortran_order': False, 'shape': (3, 2)}", bytes(24)),
    "one axis": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (6,)}", bytes(24)),
    "no rows": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 6)}"),
}


@pytest.mark.parametrize("data", NPY.values(), ids=NPY)
def test_an_odd_npy_file_is_one_sentence_and_makes_nothing(tmp_path, data):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.npy") as caught:
        import_npy({MLP: tmp_path / "a.npy"}, tmp_path / "x.zarr")
    assert "\n" not in str(caught.value)
    np.save(tmp_path / "whole.npy", values_of(MLP))
    with pytest.raises(ConfigError, match=r"a\.npy|tokens has the shape"):
        import_npy({MLP: tmp_path / "whole.npy"}, tmp_path / "x.zarr", tokens=tmp_path / "a.npy")
    assert not (tmp_path / "x.zarr").exists()


def test_an_array_in_columns_comes_in_as_its_values_are(tmp_path):
    values = values_of(MLP)
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    np.save(tmp_path / "b.npy", values)
    stores = [import_npy({MLP: tmp_path / name}, tmp_path / f"{name}.zarr") for name in ("a.npy", "b.npy")]
    assert torch.equal(*(store.read(MLP, slice(0, 40)) for store in stores))


CHUNK = {"activation": torch.ones(4, 3, 5), "tokens": torch.zeros(4, 3, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**CHUNK, "tokens": torch.zeros(4, 3)}, "holds values that are not token ids"),
        ({**CHUNK, "tokens": torch.zeros(4, 2, dtype=torch.int64)}, "tokens of shape"),
        ({**CHUNK, "tokens": torch.full((4, 3), -1)}, "holds values that are not token ids"),
        ({**CHUNK, "tokens": torch.zeros(4, 3, dtype=torch.bfloat16)}, "tokens in"),
        ({**CHUNK, "mask": torch.ones(4, 3, dtype=torch.bfloat16)}, "mask in"),
        ({**CHUNK, "activation": torch.ones(4, 3, 5, dtype=torch.int8)}, "floating-point"),
        ({**CHUNK, "activation": torch.ones(4)}, r"tokens of shape|floating-point"),
        ({"activation": CHUNK["activation"]}, "lacks tokens"),
        ({**CHUNK, "activation": torch.ones(0, 3, 5), "tokens": torch.zeros(0, 3, dtype=torch.int64)}, "shape"),
    ],
)
def test_an_odd_safetensors_chunk_is_one_sentence(tmp_path, tensors, message):
    (tmp_path / "x" / "hook").mkdir(parents=True)
    save_file(tensors, tmp_path / "x" / "hook" / "chunk-0.safetensors")
    with pytest.raises(ConfigError, match=message) as caught:
        import_safetensors(tmp_path / "x", tmp_path / "x.zarr")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged, cut short"),
        (LFS, "git lfs pull"),
        (struct.pack("<Q", 1 << 60) + b"{}", "is damaged"),
        (struct.pack("<Q", len(DEEP)) + DEEP, "is damaged"),
        (struct.pack("<Q", 2) + b"{}", "lacks activation and tokens"),
    ],
)
def test_what_is_no_safetensors_file_is_said(tmp_path, data, message):
    (tmp_path / "x" / "hook").mkdir(parents=True)
    (tmp_path / "x" / "hook" / "chunk-0.safetensors").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        import_safetensors(tmp_path / "x", tmp_path / "x.zarr")
    (tmp_path / "x" / "hook" / "chunk-0.safetensors").unlink()
    (tmp_path / "x" / "hook" / "chunk-0.safetensors").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        import_safetensors(tmp_path / "x", tmp_path / "x.zarr")


def test_an_export_into_what_is_there_or_has_no_room_names_it(small_store, tmp_path):
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="cannot be written"):
            export_saelens(small_store, place)
    for content in (b"{nope", DEEP, b"[]"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "dataset_info.json").write_bytes(content)
        with pytest.raises(ConfigError, match="holds something else"):
            export_saelens(small_store, tmp_path / "other")
        assert (tmp_path / "other" / "dataset_info.json").read_bytes() == content
    with (
        small_disk_in(tmp_path / "disk", "16k") as disk,
        pytest.raises(StorageFullError, match=rf"no room for {disk}"),
    ):
        export_saelens(small_store, disk / "out")
