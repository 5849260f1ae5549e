"""Inputs for models of others: sizes that fit together, and contents that a detector can take."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.verify.inputs import feed_any, make, read


def model(**inputs) -> onnx.ModelProto:
    """inputs: name -> (element type, shape)."""
    infos = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
    return helper.make_model(helper.make_graph([], "inputs", infos, []))


DETECTOR = {
    "pixel_mask": (TensorProto.INT64, ["n", "height", "width"]),
    "padding": (TensorProto.BOOL, ["n", "height", "width"]),
    "pixel_values": (TensorProto.FLOAT, ["n", 3, "height", "width"]),
    "orig_target_sizes": (TensorProto.INT64, ["n", 2]),
    "tokens": (TensorProto.INT64, ["n", "words"]),
}


def test_sizes_fit_together():
    first, second = make(model(**DETECTOR))
    for feed in (first, second):
        n, _, height, width = feed["pixel_values"].shape
        assert feed["pixel_mask"].shape == feed["padding"].shape == (n, height, width)
        assert feed["orig_target_sizes"].tolist() == [[width, height]] * n and feed["tokens"].shape[0] == n
        assert feed["pixel_mask"].all() and not feed["padding"].any()  # nothing is padding
    assert first["pixel_values"].shape[0] != second["pixel_values"].shape[0] > 1
    assert first["pixel_values"].shape[2:] != second["pixel_values"].shape[2:]


def test_fixed_sizes_are_kept_and_contents_differ():
    first, second = make(model(images=(TensorProto.FLOAT16, [1, 3, 64, 96])))
    assert first["images"].shape == second["images"].shape == (1, 3, 64, 96) and first["images"].dtype == np.float16
    assert (first["images"] != second["images"]).any()


def test_given_inputs_set_the_sizes():
    given = np.zeros((5, 3, 70, 90), np.float32)
    for feed in make(model(**DETECTOR), {"pixel_values": given}):
        assert feed["pixel_values"] is given and feed["pixel_mask"].shape == (5, 70, 90)
    assert feed_any(model(**DETECTOR), given)["orig_target_sizes"].tolist() == [[90, 70]] * 5
    with pytest.raises(LiteDetrError, match="'images'; the model has pixel_mask"):
        make(model(**DETECTOR), {"images": given})


def test_read(tmp_path):
    assert read(None) is None
    np.savez(tmp_path / "a.npz", images=np.ones(3))
    assert read(tmp_path / "a.npz")["images"].tolist() == [1, 1, 1]
    (tmp_path / "b.npz").write_text("no archive")
    with pytest.raises(LiteDetrError, match="is no .npz file of arrays"):
        read(tmp_path / "b.npz")
