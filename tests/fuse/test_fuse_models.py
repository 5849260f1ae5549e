"""Detectors of transformers, from both of torch's exporters, before and after what other tools do to the files."""

import numpy as np
import onnx
import pytest

import litedetr_deploy as ld
from litedetr_deploy.artifact import VERIFIED
from litedetr_deploy.errors import CheckFailed
from litedetr_deploy.ops import schema

zoo = pytest.importorskip("tests.fuse.zoo", reason="needs transformers", exc_type=ImportError)

ATTENTIONS = {
    "deformable_detr": 3, "rt_detr": 2, "rt_detr_v2": 2, "d_fine": 2, "mask2former": 1, "grounding_dino": 3,
    "lw_detr": 2,
}  # fmt: skip
slow = pytest.mark.slow
# (model, exporter, dynamic batch).  The newer exporter takes ten seconds and more for each, so two stand for all.
CASES = [
    pytest.param("rt_detr", "torchscript", False),
    *(pytest.param(name, "torchscript", True, marks=slow) for name in ATTENTIONS if name != "rt_detr_v2"),
    *(pytest.param(name, "torchscript", False, marks=slow) for name in ("deformable_detr", "rt_detr_v2")),
    pytest.param("rt_detr_v2", "dynamo", False, marks=slow),
    pytest.param("lw_detr", "dynamo", True, marks=slow),
]


def check(original, fused, attentions: int, **options):
    report = ld.fuse_onnx(original, fused, **options)
    assert report.verdict.status == VERIFIED, report.verdict
    assert len(report.regions) == attentions and report.left == []
    assert {region["form"] for region in report.regions} == {"reference points and offsets, logits"}
    kinds = [node.op_type for node in onnx.load(fused).graph.node]
    assert kinds.count(schema.PLAIN) == attentions and "GridSample" not in kinds
    return report


@pytest.mark.parametrize("name, exporter, batch", CASES)
def test_models(name, exporter, batch, tmp_path):
    original = zoo.export(tmp_path / "original.onnx", name, exporter == "dynamo", batch)
    check(original, tmp_path / "fused.onnx", ATTENTIONS[name])
    if batch:
        height, width = zoo.SIZES.get(name, zoo.SIZE)
        images = np.random.default_rng(0).random((4, 3, height, width), np.float32)
        ld.create_session(tmp_path / "fused.onnx").run(None, {"images": images})


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file with an encoder of any batch, and one with uneven points of a fixed batch."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "deformable_detr": zoo.export(folder / "deformable_detr.onnx", "deformable_detr", False, batch=True),
        "d_fine": zoo.export(folder / "d_fine.onnx", "d_fine", False),
    }


def slimmed(model):
    return pytest.importorskip("onnxslim").slim(model)


def simplified(model):
    return pytest.importorskip("onnxsim").simplify(model)[0]


def halved(model):
    return pytest.importorskip("onnxconverter_common.float16").convert_float_to_float16(model, keep_io_types=True)


@slow
@pytest.mark.parametrize(
    "name, tool", [("d_fine", slimmed), ("d_fine", simplified), ("d_fine", halved), ("deformable_detr", halved)]
)
def test_what_other_tools_wrote(name, tool, files, tmp_path):
    onnx.save(tool(onnx.load(files[name])), tmp_path / "original.onnx")
    report = check(tmp_path / "original.onnx", tmp_path / "fused.onnx", ATTENTIONS[name])
    assert report.metadata["precision"] == ("fp16" if tool is halved else "fp32")


@slow
def test_another_opset(tmp_path):
    original = zoo.export(tmp_path / "original.onnx", "rt_detr", False, opset=20)
    check(original, tmp_path / "fused.onnx", 2)


@slow
def test_any_size_of_images(tmp_path):
    original = zoo.export(tmp_path / "original.onnx", "rt_detr", False, batch=True, sides=True)
    check(original, tmp_path / "fused.onnx", 2)
    images = np.random.default_rng(0).random((1, 3, 128, 64), np.float32)
    ld.create_session(tmp_path / "fused.onnx").run(None, {"images": images})


@slow
def test_a_size_that_the_exporter_fixed(tmp_path):
    """The encoder's offsets are divided by the sizes of the maps that the model was traced with."""
    original = zoo.export(tmp_path / "original.onnx", "deformable_detr", False, batch=True, sides=True)
    report = ld.fuse_onnx(original, tmp_path / "fused.onnx")
    assert report.verdict.status == VERIFIED and len(report.regions) == 2
    assert "its scale of the offsets, which the exporter may have fixed for one size" in report.left[0]["why"]


@slow
def test_discrete_sampling(tmp_path):
    original = zoo.export(tmp_path / "original.onnx", "rt_detr_v2", False, decoder_method="discrete")
    with pytest.raises(CheckFailed, match="'discrete' sampling, which reads the nearest pixel"):
        ld.fuse_onnx(original, tmp_path / "fused.onnx")
