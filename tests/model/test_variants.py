"""Every family and Swin, exported small and verified in ONNX Runtime."""

import pytest

import litedetr_deploy as ld

pytestmark = pytest.mark.slow

SWIN = {"hidden_dim": 64, "num_heads": 2, "dim_feedforward": 64, "decoder_dim_feedforward": 64, "num_queries": 50,
        "encoder_layers": 2, "num_expansion": 1, "decoder_layers": 2}  # fmt: skip


@pytest.mark.parametrize("variant,overrides,options", [
    ("lite-deformable-detr-r26n", {}, {"attention": "op", "image_size": None, "pixel_mask": True}),
    ("lite-h-detr-r26n", {}, {"attention": "gather", "image_size": (192, 256)}),
    ("lite-dino-swin-t", SWIN, {"attention": "op", "image_size": (200, 264)}),
])  # fmt: skip
def test_export(tmp_path, variant, overrides, options):
    report = ld.export_onnx(ld.load_model(variant=variant, **overrides), tmp_path / "model.onnx", **options)
    assert report.passed
