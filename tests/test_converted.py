import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bench import meshes
from emv3_jax.converted import RECORD, Record, load_converted, read_parameters, read_record, shapes
from emv3_jax.errors import UserError

RNG = np.random.default_rng(0)
TREE = {
    "blocks": {
        "kernel": RNG.standard_normal((4, 16, 24)).astype(np.float32),
        "bias": np.arange(4.0).astype(ml_dtypes.bfloat16),
    },
    "head": np.ones(8, np.float32),
}
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), TREE)


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "model"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, TREE)
    files = {
        str(file.relative_to(path)): {"bytes": file.stat().st_size, "sha256": "0"}
        for file in path.rglob("*")
        if file.is_file()
    }
    record = Record("toy", {"width": 16}, "released", "", "float32", ({"file": "a"},), 1, files)
    record.write(path)
    return path


def test_values_come_back_in_their_own_type_or_the_one_asked_for(folder):
    params = load_converted(folder, LIKE)
    assert jax.tree.structure(params) == jax.tree.structure(TREE)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(TREE), strict=True):
        assert isinstance(got, jax.Array) and got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    rounded = load_converted(folder, LIKE, dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(rounded)} == {"bfloat16"}
    np.testing.assert_array_equal(rounded["blocks"]["kernel"], TREE["blocks"]["kernel"].astype(ml_dtypes.bfloat16))
    assert {path: leaf.dtype.name for path, leaf in shapes(folder).items()}["blocks/bias"] == "bfloat16"
    some = read_parameters(folder, ["blocks/kernel", "head"])
    assert list(some) == ["blocks/kernel", "head"]
    np.testing.assert_array_equal(some["blocks/kernel"], TREE["blocks"]["kernel"])


def test_all_differences_from_the_model_are_in_one_message(folder):
    like = {"blocks": {"kernel": LIKE["head"], "bias": LIKE["blocks"]["bias"]}, "tail": LIKE["head"]}
    with pytest.raises(UserError) as caught:
        load_converted(folder, like)
    assert str(caught.value) == (
        f"{folder} does not fit this model: missing tail; unexpected head; blocks/kernel is (4, 16, 24), not (8,)"
    )


# Orbax leaves a read behind that ends after the error of another.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_incomplete_or_damaged_is_refused_with_one_line(folder, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_converted(folder, LIKE)
        assert "\n" not in str(caught.value)

    record = (folder / RECORD).read_text()
    data = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    refused(rf"is damaged: .*{data.name} missing or not of the recorded size; convert the weights again")
    data.unlink()
    refused(f"is damaged: .*{data.name} missing")
    # Damage that leaves the sizes as they were, in the files that say what is where. Values that changed load: only
    # `python -m convert inspect` compares digests (tests/convert/test_commands.py).
    data.write_bytes(whole)
    for name in ("manifest.ocdbt", "_METADATA"):
        file = folder / name
        right = file.read_bytes()
        file.write_bytes(bytes(len(right)))
        refused("is damaged")
        file.write_bytes(right)
    load_converted(folder, LIKE)
    for text, message in (
        ("{", "is damaged"), ('{"format": "other"}', "another version"), ("[]", "is damaged"),
        (json.dumps(json.loads(record) | {"colour": 3}), "is damaged"),
    ):  # fmt: skip
        (folder / RECORD).write_text(text)
        refused(message)
    (folder / RECORD).unlink()
    refused(f"holds no {RECORD}, so it is not a complete set")
    with pytest.raises(UserError, match="no converted weights at"):
        load_converted(tmp_path / "none", LIKE)


def test_a_record_comes_back(folder):
    record = read_record(folder)
    assert (record.model, record.config, record.sources) == ("toy", {"width": 16}, ({"file": "a"},))
    assert "manifest.ocdbt" in record.files
    assert dataclasses.replace(record, files={}) == dataclasses.replace(read_record(folder), files={})


EIGHT_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from emv3_jax.converted import load_converted
assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()), ("d",))
shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
like = {"blocks": {"kernel": shape(4, 16, 24), "bias": shape(4)}, "head": shape(8)}
whole = load_converted(sys.argv[1], like)
with jax.default_device(jax.devices()[3]):
    assert load_converted(sys.argv[1], like)["head"].devices() == {jax.devices()[3]}
specs = {"blocks": {"kernel": P(None, None, "d"), "bias": P()}, "head": P("d")}
shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))
params = load_converted(sys.argv[1], like, shardings)
for got, want, sharding in zip(*map(jax.tree.leaves, (params, whole, shardings)), strict=True):
    assert got.sharding == sharding
    assert all(shard.data.shape == sharding.shard_shape(want.shape) for shard in got.addressable_shards)
    np.testing.assert_array_equal(got, want)
assert {shard.data.shape for shard in params["blocks"]["kernel"].addressable_shards} == {(4, 16, 3)}
everywhere = load_converted(sys.argv[1], like, NamedSharding(mesh, P()))
assert len(everywhere["head"].addressable_shards) == 8
print("good")
"""


def test_every_device_gets_its_part(folder):
    env = os.environ | meshes.devices_of_cpu(8)
    env["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", EIGHT_DEVICES, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "good\n", done.stderr


ONE_OF_TWO = """
import sys
import jax
from emv3_jax.converted import load_converted
jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, int(sys.argv[3]))
shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
like = {"blocks": {"kernel": shape(4, 16, 24), "bias": shape(4)}, "head": shape(8)}
assert load_converted(sys.argv[1], like)["head"].devices() == {jax.local_devices()[0]}
if jax.process_index() == 0:  # as it evaluates a run, while the other trains on
    load_converted(sys.argv[1], like)
print("good")
"""


def test_each_of_two_processes_loads_onto_a_device_of_its_own(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    running = [
        subprocess.Popen([sys.executable, "-c", ONE_OF_TWO, str(folder), port, number], **pipes) for number in "01"
    ]
    try:
        for process in running:
            out, errors = process.communicate(timeout=120)
            assert out.endswith("good\n"), errors
    finally:
        for process in running:
            process.kill()  # the other one would wait for this one for minutes


def test_want_of_memory_is_no_damage(folder, monkeypatch):
    def fail(*args, **keywords):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        load_converted(folder, LIKE)
