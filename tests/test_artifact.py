"""What a file of ours is: opening, damage, digests, and what is not proven."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import litedetr_deploy as ld
from litedetr_deploy import artifact
from litedetr_deploy.runtime.session import OnnxSession

from .runtime.tiny_artifact import save_detector, seal


def test_a_seal_breaks_with_any_byte(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    assert artifact.is_sealed(path)
    contents = bytearray(path.read_bytes())
    for place in (20, len(contents) // 2, len(contents) - 1):
        changed = contents.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        assert not artifact.is_sealed(path), place


@pytest.mark.parametrize(
    "metadata, why",
    [
        ({}, "was not made by this package"),
        ({"verification": None}, "was not verified"),
        ({"verification": []}, "was not verified"),
        ({"verification": {"verdict": "failed", "why": "boxes differ"}}, "failed its verification (boxes differ)"),
        ({"verification": {"verdict": "cannot tell", "why": "all is 0"}}, "cannot tell right from wrong (all is 0)"),
        ({"verification": {"verdict": "not verified", "why": "no GPU"}}, "was not verified (no GPU)"),
    ],
)
def test_what_is_not_proven(tmp_path, metadata, why):
    assert why in artifact.distrust(tmp_path / "model.plan", metadata)


def test_a_verified_file_is_trusted_until_it_is_rewritten(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    metadata = OnnxSession(path).metadata
    assert artifact.distrust(path, metadata) == ""
    onnx.save(onnx.load(path), path)  # the same bytes: nothing was changed
    assert artifact.distrust(path, metadata) == ""
    model = onnx.load(path)
    model.producer_name = "another tool"
    onnx.save(model, path)
    assert artifact.distrust(path, metadata) == "was rewritten after it was verified"


@pytest.mark.parametrize("text", ["{", "[]", "7", "[" * 100_000, '{"a":' * 100_000])
def test_metadata_that_is_no_object(tmp_path, text):
    with pytest.raises(ld.LiteDetrError, match="not a JSON object"):
        artifact.parse_metadata(text, "model.onnx")
    path = save_detector(tmp_path / "model.onnx")
    model = onnx.load(path)
    model.metadata_props[0].value = text
    onnx.save(model, path)
    with pytest.raises(ld.LiteDetrError, match="not a JSON object"):
        ld.create_session(path)


def test_the_opset_version_without_onnx(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    for source in (path, path.read_bytes()):
        assert artifact.opset_version(source, "litedetr") == 1 and artifact.opset_version(source, "others") is None
    model = onnx.load(path)
    model.opset_import[1].version = 1000  # two bytes
    assert artifact.opset_version(model.SerializeToString(), "litedetr") == 1000
    assert artifact.opset_version(b"no protocol buffer at all", "litedetr") is None


def test_another_version_of_the_op_domain_does_not_run(tmp_path):
    path = save_detector(tmp_path / "model.onnx")
    model = onnx.load(path)
    [ours] = [opset for opset in model.opset_import if opset.domain == "litedetr"]
    ours.version = 99
    seal(model, path, {})
    for source in (path, path.read_bytes()):
        with pytest.raises(ld.LiteDetrError, match="imports version 99 of the opset 'litedetr'.*has version 1"):
            ld.create_session(source)


def save_external(path, location="weights.bin"):
    """Write a model that adds 1000 weights, which are in another file."""
    weights = numpy_helper.from_array(np.ones(1000, np.float32), "weights")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1000]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "weights"], ["y"])], "g", *map(list, zip(values)), [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    if location != "weights.bin":
        model = onnx.load(path, load_external_data=False)
        [entry] = [entry for entry in model.graph.initializer[0].external_data if entry.key == "location"]
        entry.value = location
        path.write_bytes(model.SerializeToString())
    return path


def lose(folder):
    (folder / "weights.bin").unlink()


def cut(folder):
    with open(folder / "weights.bin", "r+b") as file:
        file.truncate(100)


@pytest.mark.parametrize(
    "location, harm, by_ort, by_onnx",
    [
        (
            "weights.bin",
            lose,
            "a file that is not there.*weights.bin.*Copy that file",
            "weights.bin', which is not beside",
        ),
        ("weights.bin", cut, "a file that is cut short.*weights.*Copy that file again", "has 100 bytes.*cut short"),
        ("../weights.bin", lose, "outside its own folder.*Save it as one file", "outside its own folder"),
        ("/weights.bin", lose, "outside its own folder", "outside its own folder"),
    ],
)
def test_external_data(tmp_path, location, harm, by_ort, by_onnx):
    (tmp_path / "model").mkdir()
    path = save_external(tmp_path / "model" / "model.onnx", location)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "model" / "weights.bin").read_bytes())
    harm(tmp_path / "model")
    with pytest.raises(ld.LiteDetrError, match=f"model.onnx keeps its weights in .*{by_ort}"):
        ld.create_session(path)
    with pytest.raises(ld.LiteDetrError, match=by_onnx):
        artifact.load_onnx(path)


def test_whole_external_data_is_read(tmp_path):
    path = save_external(tmp_path / "model.onnx")
    assert artifact.load_onnx(path).graph.initializer[0].raw_data == np.ones(1000, np.float32).tobytes()
    assert ld.create_session(path).run(None, {"x": np.ones(1000, np.float32)})[0].sum() == 2000


def test_a_store_resumes_its_own_run_only(tmp_path):
    path = tmp_path / "folder" / "store.jsonl"
    store = artifact.Store(path, {"run": 1})
    for i in range(3):
        store.add(str(i), {"value": i})
    path.write_bytes(path.read_bytes() + b'{"key": "3", "val')  # killed while it wrote
    again = artifact.Store(path, {"run": 1})
    assert again.resumed == 3 and again.items["2"] == {"value": 2}
    assert artifact.Store(path, {"run": 2}).resumed == 0
    again.add("4", {"value": 4})
    assert list(artifact.Store(path, {"run": 1}).items) == ["0", "1", "2", "4"]
    again.remove()
    assert not path.exists()


def test_a_file_of_something_else(tmp_path):
    model = onnx.load(save_detector(tmp_path / "model.onnx"))
    assert artifact.onnx_metadata(model, "model.onnx")["variant"]
    del model.metadata_props[:]
    with pytest.raises(ld.LiteDetrError, match="was not made by `litedetr export`"):
        artifact.onnx_metadata(model, "model.onnx")
