import contextlib
import errno
import json
import os
import shutil
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dfq_jax.base.files import owned
from dfq_jax.errors import DataError, ExportError, ResourceError, UsageError
from dfq_jax.io.artifacts.artifact import (
    Enclosed,
    Origin,
    check_output_folder,
    load_artifact,
    save_artifact,
)
from dfq_jax.io.artifacts.output_folder import replace_all, settle
from dfq_jax.io.artifacts.quantized_tensors import stored_codes, value_of_bias
from dfq_jax.io.verification.verify import simulated
from dfq_jax.numerics.affine import Affine, quantize_bias

CASES = (
    ("residual", "w8a8", "qdrop_8bit_ends"),
    ("vgg", "w4a8", "zsq_all_low"),
    ("odd", "w5a6", "qdrop_8bit_ends"),
    ("extreme", "w2a2", "qdrop_8bit_ends"),
)
ORIGIN = Origin({"method": "noise", "seed": 0}, {"agreement": 0.99}, "fast", 7)
OURS = {"manifest.json", "model.onnx", "float.onnx", "model.safetensors", "run.py"}


@pytest.fixture
def save(onnx_nets):
    """Saves a small artifact with the given exceptions."""

    def with_defaults(folder, files=MappingProxyType({}), origin=ORIGIN, **how):
        q, model = onnx_nets.quantized("extreme", "w2a2"), onnx_nets.NETS["extreme"]()
        enclosed = Enclosed(files)
        return save_artifact(folder, q, float_model=model, origin=origin, enclosed=enclosed, **how)

    return with_defaults


def snapshot(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize(("net", "scheme", "layers"), CASES)
def test_loading_gives_the_same_network_bit_by_bit(onnx_nets, tmp_path, net, scheme, layers):
    q = onnx_nets.quantized(net, scheme, layers)
    written = save_artifact(
        tmp_path / "out",
        q,
        float_model=onnx_nets.NETS[net](),
    )
    found = load_artifact(tmp_path / "out")
    assert found.manifest == written
    assert found.quantized.plan == q.plan
    assert found.quantized.model.graph == q.model.graph
    assert found.quantized.model.contract == q.model.contract
    before, after = stored_codes(q), stored_codes(found.quantized)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert jax.tree.map(lambda v: v.dtype, before) == jax.tree.map(lambda v: v.dtype, after)
    x = onnx_nets.images(q.model, 4)
    np.testing.assert_array_equal(simulated(found.quantized, x), simulated(q, x))
    again = save_artifact(
        tmp_path / "again",
        found.quantized,
        float_model=onnx_nets.NETS[net](),
    )
    assert again["files"] == written["files"]


def test_the_manifest_tells_everything(save, tmp_path):
    out = tmp_path / "päth with spaces" / "out"
    manifest = save(
        out, files={"report.html": b"<html>"}, origin=ORIGIN._replace(source={"name": "a.pth"})
    )
    assert {p.name for p in out.iterdir()} == OURS | {"report.html"}
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["schema_version"] == 1
    assert manifest["status"] == "ok"
    assert manifest["scheme"] == "w2a2"
    assert manifest["layers"] == "qdrop_8bit_ends"
    assert (manifest["preset"], manifest["seed"]) == ("fast", 7)
    assert manifest["source"] == {"name": "a.pth"}
    assert manifest["report"] == {"agreement": 0.99}
    assert manifest["images"]["method"] == "noise"
    assert set(manifest["files"]) == OURS - {"manifest.json"} | {"report.html"}
    assert len(manifest["weights_sha256"]) == 64
    assert {"jax", "numpy", "onnx", "python"} <= set(manifest["versions"])
    artifact = load_artifact(out)
    assert not artifact.failed
    assert artifact.onnx_path == out / "model.onnx"
    assert artifact.float_path.is_file()


def test_a_failed_network_has_a_name_that_says_so(save, tmp_path):
    save(tmp_path)
    manifest = save(tmp_path, failed=True)
    assert manifest["status"] == "failed"
    assert {p.name for p in tmp_path.iterdir()} == OURS - {"model.onnx"} | {"model.failed.onnx"}
    artifact = load_artifact(tmp_path)
    assert artifact.failed
    assert artifact.onnx_path.is_file()
    save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == OURS


def test_an_artifact_is_replaced_and_files_of_others_stay(save, tmp_path):
    save(tmp_path, files={"report.html": b"old"})
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, origin=ORIGIN._replace(seed=8))
    assert {p.name for p in tmp_path.iterdir()} == OURS | {"notes.txt"}
    assert load_artifact(tmp_path).manifest["seed"] == 8


def test_folders_of_others_need_force_and_lose_nothing(save, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"photo\.jpg.*`force=True`"):
        save(tmp_path)
    assert snapshot(tmp_path) == {"photo.jpg": b"mine"}
    save(tmp_path, force=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"mine"
    assert load_artifact(tmp_path).manifest["seed"] == 7


def test_even_force_never_replaces_files_of_others(save, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"model\.onnx.*never replaced"):
        save(tmp_path, force=True)
    assert snapshot(tmp_path) == {"model.onnx": b"mine"}


@pytest.mark.parametrize("manifest", ["{", "[]", '{"format": "other"}', '{"a": NaN}'])
def test_a_manifest_of_others_does_not_make_a_folder_ours(save, tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=r"manifest\.json"):
        save(tmp_path, force=True)
    with pytest.raises(DataError, match=r"manifest"):
        load_artifact(tmp_path)


def test_check_output_folder_answers_early(tmp_path, monkeypatch):
    check_output_folder(tmp_path)
    check_output_folder(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file"):
        check_output_folder(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="read-only"):
        check_output_folder(tmp_path / "new")


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, ResourceError), (errno.EROFS, UsageError)]
)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_failing_disk_leaves_the_old_artifact_intact(
    save, tmp_path, monkeypatch, number, kind, after
):
    save(tmp_path)
    before, real, calls = snapshot(tmp_path), os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) > after:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(kind):
        save(tmp_path, origin=ORIGIN._replace(seed=8))
    monkeypatch.undo()
    assert snapshot(tmp_path) == before
    assert load_artifact(tmp_path).manifest["seed"] == 7


def test_remains_of_killed_runs_are_removed_and_live_ones_respected(save, tmp_path):
    stale = tmp_path / ".partial-1-ab"  # as earlier versions called it
    stale.mkdir()
    (stale / "model.onnx").write_bytes(b"half")
    check_output_folder(tmp_path)
    save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == OURS
    with owned(tmp_path, ".partial-save"):
        for work in (check_output_folder, save):
            with pytest.raises(UsageError, match=rf"process {os.getpid()} on .*partial-save\.lock"):
                work(tmp_path)


class Killed(BaseException):
    """What no cleaning up follows."""


def content_of(seed, *names):
    """Files of an artifact of which nobody looks into, the manifest last."""
    files = {name: f"{name} {seed}".encode() for name in names}
    manifest = {"format": "dfq_jax artifact", "schema_version": 1, "status": "ok", "seed": seed}
    manifest |= {"files": dict.fromkeys(names), "contract": {}, "graph": {}, "plan": {}}
    manifest |= {"report": {}, "scheme": "w8a8"}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize("first", [True, False])
def test_a_kill_while_files_are_moved_leaves_the_old_artifact_or_the_new(
    tmp_path, monkeypatch, first
):
    """After every rename there is; whoever comes next ends what was begun."""
    replace, seen = os.replace, []
    before = {} if first else content_of(1, "model.failed.onnx", "float.onnx", "old.txt")
    after, last = content_of(2, "model.onnx", "float.onnx", "new.txt"), content_of(3, "model.onnx")
    for step in range(40):
        folder = tmp_path / f"{step}"
        folder.mkdir()
        if before:
            replace_all(folder, before)
        (folder / "notes.txt").write_bytes(b"mine")
        moves = []

        def dying(*where, step=step, moves=moves):
            moves.append(where)
            if len(moves) > step:
                raise Killed
            replace(*where)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a kill removes nothing
            with contextlib.suppress(Killed):
                replace_all(folder, after)
        settle(folder)
        found = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        assert found.pop("notes.txt") == b"mine"
        seen.append(found == after)
        assert found in (before, after)
        check_output_folder(folder, force=True)
        replace_all(folder, last)
        assert snapshot(folder) == {**last, "notes.txt": b"mine"}
        if len(moves) <= step:
            break
    assert seen == sorted(seen)
    assert seen.count(False) == 5  # four files are written, and then the folder has its name
    assert seen.count(True) == 5


@pytest.mark.parametrize("name", ["model.onnx", "float.onnx", "model.safetensors"])
def test_what_has_no_hash_is_refused(save, tmp_path, name):
    manifest = save(tmp_path)
    del manifest["files"][name]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"has no hash of {name}"):
        load_artifact(tmp_path)


@pytest.mark.parametrize("name", sorted(OURS - {"manifest.json"}))
def test_damage_is_found_and_named(save, tmp_path, name):
    save(tmp_path)
    data = bytearray((tmp_path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / name).write_bytes(bytes(data))
    with pytest.raises(DataError, match=rf"{name} is not what was saved"):
        load_artifact(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        load_artifact(tmp_path)


def test_manifests_cannot_point_elsewhere_or_come_from_the_future(save, tmp_path):
    manifest = save(tmp_path)
    path = tmp_path / "manifest.json"
    outside = {**manifest["files"], "../x": {"bytes": 0, "sha256": ""}}
    for change, message in (
        ({"files": outside}, "no plain file"),
        ({"schema_version": 2}, "schema version 2"),
        ({"plan": []}, "plan missing"),
    ):
        path.write_text(json.dumps({**manifest, **change}))
        with pytest.raises(DataError, match=message):
            load_artifact(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="no artifact"):
        load_artifact(tmp_path)


def test_only_plain_data_and_plain_names_are_saved(save, tmp_path):
    with pytest.raises(ExportError, match="plain, finite JSON"):
        save(tmp_path, origin=Origin(report={"agreement": float("nan")}))
    with pytest.raises(UsageError, match="plain names"):
        save(tmp_path, files={"../x": b""})
    with pytest.raises(UsageError, match="may not be called"):
        save(tmp_path, files={"model.onnx": b""})
    assert list(tmp_path.iterdir()) == []


def test_bias_codes_beyond_float32_precision_survive():
    rng = np.random.default_rng(0)
    data = Affine(jnp.float32(0.0123), jnp.uint8(3))
    kernel = Affine(jnp.asarray(rng.uniform(1e-4, 1e-2, (1, 1, 1, 4096)), jnp.float32), jnp.int8(0))
    bias = jnp.asarray(rng.normal(size=4096) * 10.0 ** rng.uniform(-3, 3.5, 4096), jnp.float32)
    want = quantize_bias(bias, data.scale, kernel.scale)
    assert np.abs(want).max() > 2**24
    value = value_of_bias(want, data, kernel)
    np.testing.assert_array_equal(quantize_bias(value, data.scale, kernel.scale), want)
