import json
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from convert import sources
from convert.sources import SafetensorsFile, TiedTensors, open_source, sha256
from emv3_jax.errors import UserError

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(3, np.int64), "d": np.zeros((0, 5), np.float16),
}  # fmt: skip


def test_reads_what_the_formats_own_library_writes_and_the_other_way_round(tmp_path, write):
    save_file(TENSORS, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert source.header.keys() == TENSORS.keys()
    for key, value in TENSORS.items():
        assert (source.header[key].shape, source.header[key].dtype) == (value.shape, value.dtype)
        assert source.read(key).tobytes() == value.tobytes() and source.read(key).shape == value.shape
    write(tmp_path / "b.safetensors", dict(sorted(TENSORS.items(), key=lambda item: -item[1].dtype.itemsize)))
    written = load_file(tmp_path / "b.safetensors")
    assert all(written[key].tobytes() == value.tobytes() for key, value in TENSORS.items())


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path, write):
    file = write(tmp_path / "a.safetensors", {"a": TENSORS["a"], "b": TENSORS["b"]})
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.safetensors") as caught:
            open_source(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=f"it has {len(whole) + 1} bytes of {len(whole)}; fetch or save it again"):
        open_source(file)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', "the place of a does not fit its shape"),
        ('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', "the place of a does not fit"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', "the place of a does not fit"),
        ('{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}}', "a is of type Q4, which this program cannot read"),
        ('{"a":{"dtype":"F32"}}', "its header is damaged"),
        ('{"a":[]}', "its header is damaged"),
        ("[1, 2]", "its header is damaged"),
        (
            '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            "its header is damaged .doubled: a.",
        ),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, message):
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match=message):
        open_source(file)


def test_a_file_that_shrinks_after_it_was_opened_is_noticed(tmp_path, write):
    source = open_source(write(tmp_path / "a.safetensors", {"a": TENSORS["a"]}))
    source.path.write_bytes(source.path.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends within a"):
        source.read("a")


def shards(folder, write, **where):
    write(folder / "x-1.safetensors", {"a": TENSORS["a"]})
    write(folder / "x-2.safetensors", {"b": TENSORS["b"]})
    index = folder / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"} | where}))
    return index


def test_a_set_of_shards_is_one_checkpoint(tmp_path, write):
    index = shards(tmp_path, write)
    for path in (index, tmp_path):  # the folder holds one set
        source = open_source(path)
        assert source.read("b").tobytes() == TENSORS["b"].tobytes()
        assert [path.name for path in source.files] == [index.name, "x-1.safetensors", "x-2.safetensors"]


def test_missing_and_contradicting_shards_are_named(tmp_path, write):
    index = shards(tmp_path, write, c="x-2.safetensors")
    with pytest.raises(UserError, match="does not fit its shards: c is not in x-2.safetensors"):
        open_source(index)
    write(tmp_path / "x-2.safetensors", {"a": TENSORS["a"], "b": TENSORS["b"]})
    shards_index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    index.write_text(json.dumps(shards_index))
    with pytest.raises(UserError, match=r"a is in x-2.safetensors and in x-1.safetensors"):
        open_source(index)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(UserError, match="1 of 2 shards missing: x-2.safetensors; put them beside it"):
        open_source(index)
    index.write_text("{}")
    with pytest.raises(UserError, match="is not an index of shards"):
        open_source(index)


@pytest.mark.parametrize("name", ["../x-1.safetensors", "/x-1.safetensors", "x.safetensors.index.json", "a.txt", ""])
def test_an_index_names_only_files_of_weights_beside_it(tmp_path, write, name):
    index = shards(tmp_path / "set", write, c=name)
    write(tmp_path / "x-1.safetensors", {"c": TENSORS["a"]})
    with pytest.raises(UserError, match="shards must lie beside it, and end in .safetensors, .bin") as caught:
        open_source(index)
    assert f"names {name}" in str(caught.value)


def test_unknown_files_and_folders_are_refused(tmp_path, write):
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="holds no weights: looked for"):
        open_source(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="unknown kind of file"):
        open_source(tmp_path / "a.txt")
    for name in ("a", "b"):
        write(tmp_path / f"{name}.safetensors", {"a": TENSORS["a"]})
    with pytest.raises(UserError, match="holds 2 files of weights: name one of a.safetensors, b.safetensors"):
        open_source(tmp_path)


def test_a_tensor_with_two_names_is_one(tmp_path, write):
    def tied(tensors):
        return TiedTensors(SafetensorsFile(write(tmp_path / "a.safetensors", tensors)), "one", "two")

    x, rest = TENSORS["a"], {"rest": TENSORS["b"]}
    for tensors in ({"one": x, **rest}, {"two": x, **rest}, {"one": x, "two": x, **rest}):
        source = tied(tensors)
        assert source.header.keys() == {"one", "rest"}
        assert source.read("one").tobytes() == x.tobytes()
        assert source.read("rest").tobytes() == TENSORS["b"].tobytes()
    with pytest.raises(UserError, match="one and two must be equal, and differ"):
        tied({"one": x, "two": x + 1})
    with pytest.raises(UserError, match="differ"):
        tied({"one": x, "two": x.astype(np.float64)})
    assert tied(rest).header.keys() == {"rest"}


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    heard = []
    assert sha256(tmp_path / "a", heard.append).startswith("ba7816bf8f01cfea")
    assert heard == [3]


def test_without_torch_a_pickle_ends_with_one_line_that_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r'to read it, install torch: pip install "emv3_jax\[torch\]"$'):
        open_source(tmp_path / "a.pth")


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="torch reads .pth files; it is an extra")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_read_without_running_code(tmp_path, torch, monkeypatch, zipped):
    monkeypatch.setattr(sources, "REMAP_AFTER", 8)
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(6.0).reshape(2, 3).T,
        "c": torch.arange(4).to(torch.bfloat16), "d": torch.tensor(3),
    }  # fmt: skip
    if zipped:  # torch itself cannot read 8-bit floats of the older format
        tensors["e"] = torch.arange(4).to(torch.float8_e4m3fn)
    for saved in (tensors, {"state_dict": tensors, "epoch": 3}):
        torch.save(saved, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        source = open_source(tmp_path / "a.pth")
        assert source.header.keys() == tensors.keys()
        for key, value in tensors.items():
            assert source.header[key].shape == tuple(value.shape) and source.read(key).shape == tuple(value.shape)
            np.testing.assert_array_equal(source.read(key).astype(np.float64), value.to(torch.float64).numpy())
        types = ["float32", "float32", "bfloat16", "int64", "float8_e4m3fn"][: len(tensors)]
        assert [str(source.read(key).dtype) for key in tensors] == types


def test_pickles_with_code_are_refused_by_name(tmp_path, torch):
    file = tmp_path / "a.pth"
    torch.save({"a": RunsCode()}, file)
    saved = [file.read_bytes(), pickle.dumps({"a": RunsCode()}), pickle.dumps({"a": RunsCode()}, protocol=2)]
    for content in saved:
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"a\.pth is refused: loading it would run .*exec, and weights need no code"
        ):
            open_source(file)
    torch.save(torch.nn.Linear(2, 2), file)
    with pytest.raises(UserError, match="would run torch.nn.modules.linear.Linear"):
        open_source(file)


def test_damaged_and_odd_pickles_are_refused(tmp_path, torch):
    file = tmp_path / "a.pth"
    torch.save({"a": torch.zeros(100)}, file)
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="not a readable PyTorch file: it is cut short"):
        open_source(file)
    file.write_bytes(b"hello, this is nothing")
    with pytest.raises(UserError, match="it is no pickle of tensors"):
        open_source(file)
    torch.save([torch.zeros(1)], file)
    with pytest.raises(UserError, match="holds a list, not tensors by name"):
        open_source(file)
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, file)
    with pytest.raises(UserError, match="not a flat set of tensors; model, epoch are something else"):
        open_source(file)
    torch.save({"a": torch.zeros(2, dtype=torch.complex64), "b": torch.zeros(2, 2).to_sparse()}, file)
    with pytest.raises(UserError, match="b are sparse or quantized"):
        open_source(file)
