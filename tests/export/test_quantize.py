"""`litedetr_deploy.export.quantize`: what becomes INT8, from which images, and what is refused."""

import collections
import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from PIL import Image
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.artifact import METADATA_KEY
from litedetr_deploy.assets.shapes import scene
from litedetr_deploy.export import export, limits, precision, quantize
from litedetr_deploy.verify import typed
from litedetr_deploy.verify.onnx import verify_onnx

from .test_precision import SIZE, inferred, save, set_opset, traced

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module")
def images():
    return quantize.Calibration([scene(i, 3)[0] for i in range(2)], SIZE, False, "detections")


def float_model():
    model = ir.load(traced()[1] / "fp32.onnx")
    set_opset(model, 19)
    return model


@pytest.fixture(scope="module")
def names():
    return quantize.layers(float_model().graph)


@pytest.fixture(scope="module")
def ranges(names, images, tmp_path_factory):
    table = tmp_path_factory.mktemp("table") / "model.calibration.json"
    return quantize.load_or_calibrate(float_model(), names, images, "minmax", table, lambda stage: None)


@pytest.fixture(scope="module")
def quantized(names, ranges):
    model = quantize.apply(float_model(), names, ranges)
    precision.apply(model, "int8")
    return model


def test_what_is_quantized(names, quantized):
    assert {"detector.backbone.conv1/Conv", "detector.encoder.layers.0.linear2/MatMul"} <= set(names)
    assert "detector.encoder.layers.3.self_attn.value_proj/MatMul" in names
    kept = ("sampling_offsets", "decoder", "enc_out", "class_embed", "bbox_embed", "Attn/")
    assert not [name for name in names if any(part in name for part in kept)]
    assert precision.count(quantized)["int8"] == len(names)
    dequantized = [node for node in quantized.graph if node.op_type == "DequantizeLinear"]
    readers = {user.name for node in dequantized for user, _ in node.outputs[0].uses()}
    assert readers == set(names)  # no residual sum reads a rounded value
    inferred(ir.to_proto(quantized))


def test_symmetric_steps_by_channel(quantized):
    constants = {name: value.const_value.numpy() for name, value in quantized.graph.initializers.items()}
    original = float_model().graph.initializers
    for node in quantized.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        data, step, zero = node.inputs
        assert zero.dtype == ir.DataType.INT8 and not constants[zero.name].any()
        assert (constants[step.name] > 0).all()
        if not data.is_initializer():
            assert constants[step.name].ndim == 0
            continue
        axis = node.attributes["axis"].as_int()
        weight = original[data.name.removesuffix("_quantized")].const_value.numpy()
        assert constants[step.name].shape == (weight.shape[axis],)
        steps = np.expand_dims(constants[step.name], [i for i in range(weight.ndim) if i != axis]).astype(np.float32)
        # The steps are stored in half and are exact there: no weight is off by more than half of one.
        assert (np.abs(constants[data.name] * steps - weight) <= 0.5001 * steps).all()
        assert np.abs(constants[data.name]).max() == typed.LARGEST


def test_the_graph_computes_what_pytorch_does_with_these_steps(quantized, tmp_path):
    verification = verify_onnx(save(quantized, "int8", tmp_path / "model.onnx"), traced()[0], [scene(0, 3)[0]])
    assert verification.passed, str(verification)


@pytest.fixture(scope="module")
def on_cpu(images, tmp_path_factory):
    """Names, ranges and the graph of the target 'cpu', and the folder that has it as model.onnx."""
    folder = tmp_path_factory.mktemp("cpu")
    names = quantize.layers(float_model().graph, target="cpu")
    table = folder / "model.calibration.json"
    ranges = quantize.load_or_calibrate(float_model(), names, images, "minmax", table, lambda stage: None, "cpu")
    model = quantize.apply(float_model(), names, ranges, "cpu")
    proto = ir.to_proto(model)
    metadata = {"precision": "int8", "target": "cpu", "attention": "op"}
    onnx.helper.set_model_props(proto, {METADATA_KEY: json.dumps(metadata)})
    onnx.save(proto, folder / "model.onnx")
    return names, ranges, model, folder


def test_what_is_quantized_for_a_cpu(on_cpu, names):
    chosen, ranges, model, _ = on_cpu
    layers = traced()[0].config.decoder_layers
    of_decoder = {
        f"detector.decoder.layers.{i}.{name}/MatMul"
        for i in range(layers)
        for name in ("cross_attn.value_proj", "linear1", "linear2")
    }
    assert set(chosen) == set(names) - {"detector.backbone.conv1/Conv"} | of_decoder
    sums = [node.name for node in model.graph if node.op_type == "Add" and "backbone.layer" in node.name]
    assert precision.count(model) == precision.count(model) | {"half": 0, "int8": len(chosen) + len(sums), "casts": 0}
    constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    nodes = {node.name: node for node in model.graph}
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            data, step, zero = node.inputs
            positive = data.producer().op_type == "Relu"
            assert zero.dtype == ir.DataType.UINT8 and constants[zero.name] == (0 if positive else 128)
            largest = ranges[data.name.removesuffix("_rows")]
            if data.producer().op_type == "Conv" and "input_proj" in data.producer().name:
                largest += np.abs(constants[f"{data.producer().name.removesuffix('/Conv')}.bias_column"]).max()
            assert largest <= (255 if positive else 127) * constants[step.name] <= 1.01 * largest  # a float16
    block = nodes["detector.backbone.layer1.0/Add"]  # both of what is summed up, and the sum's reader, are INT8
    assert [value.producer().op_type for value in block.inputs] == ["DequantizeLinear"] * 2
    bias = nodes["detector.encoder.layers.0.linear1/Gemm"].inputs[2].producer()
    assert bias.inputs[0].dtype == ir.DataType.INT32
    found = constants[bias.inputs[0].name] * constants[bias.inputs[1].name].astype(np.float64)
    original = float_model().graph.initializers[bias.inputs[0].name.removesuffix("_quantized")].const_value.numpy()
    assert (np.abs(found - original) <= 0.5001 * constants[bias.inputs[1].name]).all()
    for level in range(4):  # what a norm reads has its bias added to the quantized product
        projection = nodes[f"detector.input_proj.{level}.0/Conv"]
        (added,) = [node for node in model.graph if node.op_type == "Add" and node.inputs[1].name.startswith(
            f"detector.input_proj.{level}.0.bias")]  # fmt: skip
        assert len(projection.inputs) == 2 and added.inputs[0].producer().op_type == "DequantizeLinear"
        assert added.inputs[0].producer().inputs[0].producer().inputs[0] is projection.outputs[0]
    inferred(ir.to_proto(model))


def test_the_last_relu_of_a_block_says_what_its_output_is(on_cpu):
    names, ranges, model, _ = on_cpu
    block, reader = "detector.backbone.layer1.0", "detector.backbone.layer1.1.conv1/Conv"
    assert typed.modules(ir.to_proto(model))[block].output.low == 0
    without = quantize.apply(float_model(), [name for name in names if name != reader], ranges, "cpu")
    found = typed.modules(ir.to_proto(without))
    assert f"{block}.conv3" in found and block not in found  # though the ReLUs inside the block are quantized


def test_a_graph_for_a_cpu_computes_what_pytorch_does_with_these_steps(on_cpu, tmp_path):
    folder = on_cpu[3]
    verdict = verify_onnx(folder / "model.onnx", traced()[0], [scene(0, 3)[0]])
    assert verdict.passed and verdict.ran == "the model", str(verdict)


@pytest.mark.parametrize("target", ["gpu", "cpu"])
def test_verification_sees_a_wrong_step(target, quantized, on_cpu, tmp_path):
    path = save(quantized, "int8", tmp_path / "model.onnx")
    proto = onnx.load(path if target == "gpu" else on_cpu[3] / "model.onnx")
    (node,) = [node for node in proto.graph.node if node.name == "detector.input_proj.0.0/Conv"]
    (dequantize,) = [other for other in proto.graph.node if node.input[1] in other.output]
    (step,) = [tensor for tensor in proto.graph.initializer if tensor.name == dequantize.input[1]]
    array = onnx.numpy_helper.to_array(step).copy()
    array[::2] *= 3
    step.CopyFrom(onnx.numpy_helper.from_array(array, step.name))
    onnx.save(proto, path)
    assert not verify_onnx(path, traced()[0], [scene(0, 3)[0]]).passed


def test_both_runtimes_of_a_cpu_run_their_int8_kernels(on_cpu, tmp_path):
    names, _, _, folder = on_cpu
    convolutions = sum(name.endswith("/Conv") for name in names)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ld.create_session(folder / "model.onnx", threads=1, options=options)
    counts = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert counts["QLinearConv"] == convolutions
    assert counts["QGemm"] == len(names) - convolutions

    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    core.add_extension(str(ld.native.library("openvino")))
    compiled = core.compile_model(core.read_model(folder / "model.onnx"), "CPU", {"INFERENCE_NUM_THREADS": 1})
    kinds = collections.Counter()
    for operation in compiled.get_runtime_model().get_ops():
        found = operation.get_rt_info()
        kinds[found["layerType"].astype(str), found["runtimePrecision"].astype(str) in ("i8", "u8")] += 1
    assert kinds["Convolution", True] == convolutions
    assert kinds["FullyConnected", True] == len(names) - convolutions


def test_products_of_dynamic_sizes_on_a_cpu():
    """Two Linears with a ReLU between, on data of which two sizes are unknown, are Gemms one after the other."""
    random = np.random.default_rng(0)
    shapes = {"first": (6, 10), "bias": (10,), "second": (10, 4), "scale": (3, 6)}
    arrays = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    model = ir.from_onnx_text("""
        <ir_version: 9, opset_import: ["" : 19]>
        g (float[n, k, 3, 6] x) => (float[n, k, 3, 4] y) {
           scaled = Mul(x, scale)
           product = MatMul(scaled, first)
           sum = Add(product, bias)
           positive = Relu(sum)
           y = MatMul(positive, second)
        }""", initializers=[ir.tensor(array, name=name) for name, array in arrays.items()])  # fmt: skip
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    x = random.standard_normal((2, 5, 3, 6)).astype(np.float32)
    scaled = x * arrays["scale"]
    positive = np.maximum(scaled @ arrays["first"] + arrays["bias"], 0)
    ranges = {"scaled": np.abs(scaled).max(), "positive": positive.max()}
    quantized = ir.to_proto(quantize.apply(model, ["product/MatMul", "y/MatMul"], ranges, "cpu"))
    onnx.checker.check_model(quantized, full_check=True)
    wanted = ["Reshape", "Gemm", "Relu", "Gemm", "Reshape"]
    assert [node.op_type for node in quantized.graph.node if node.op_type in {*wanted, "MatMul", "Add"}] == wanted
    (found,) = ld.create_session(quantized.SerializeToString(), threads=1).run(None, {"x": x})
    right = positive @ arrays["second"]
    # Half a step of every factor, times what it is multiplied with.
    steps = [typed.step_of(ranges["scaled"]), typed.step_of(ranges["positive"], 255)]
    weights = [typed.step_of(np.abs(arrays[name]).max()) for name in ("first", "second")]
    inner = 6 * (steps[0] * np.abs(arrays["first"]).max() + weights[0] * np.abs(scaled).max()) / 2 + steps[1]
    outer = 10 * (inner * np.abs(arrays["second"]).max() + weights[1] * positive.max() / 2)
    assert 0.001 * outer < np.abs(found - right).max() <= outer


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_methods_cut_the_range(method, names, ranges, images, tmp_path):
    few = names[:4]
    found = quantize.load_or_calibrate(float_model(), few, images, method, tmp_path / "table", lambda stage: None)
    assert len(found) < len(ranges)
    assert all(0 < largest <= ranges[tensor] * 1.01 for tensor, largest in found.items())


def test_the_table_is_kept_and_a_stale_one_is_not_used(names, images, tmp_path):
    table, stages = tmp_path / "model.calibration.json", []

    def calibrate(model, images, method="minmax", number=2):
        return quantize.load_or_calibrate(model, names[:number], images, method, table, stages.append)

    first = calibrate(float_model(), images)
    assert "2 images, minmax" in stages[-1]
    assert json.loads(table.read_text())["images"] == 2
    marked = json.loads(table.read_text())
    marked["ranges"] = {tensor: largest + 1 for tensor, largest in first.items()}
    table.write_text(json.dumps(marked))
    assert calibrate(float_model(), images) == calibrate(float_model(), None) == marked["ranges"]
    assert "has it" in stages[-1]
    calibrate(float_model(), images, "percentile")
    assert "again" in stages[-1] and "another method" in stages[-1]

    calibrate(float_model(), images, "percentile", number=3)
    assert "another set of layers" in stages[-1]

    other = float_model()
    weight = other.graph.initializers["detector.backbone.conv1.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(2), name=weight.name)
    with pytest.raises(ld.LiteDetrError, match="another model"):
        calibrate(other, None)
    calibrate(other, images, "percentile")
    assert "another model" in stages[-1]
    table.write_text("{")
    with pytest.raises(ld.LiteDetrError, match="damaged"):
        calibrate(other, None)


def test_sensitivity_ranks_the_layer_with_the_coarsest_steps_first(names, ranges, images):
    model = float_model()
    few = [name for name in names if "encoder.layers.3.linear" in name or "input_proj" in name]
    coarse = "detector.encoder.layers.3.linear2/MatMul"
    (tensor,) = [node.inputs[0].name for node in model.graph if node.name == coarse]
    rows = quantize.sensitivity(traced()[0], model.graph, few, ranges | {tensor: 500 * ranges[tensor]}, images)
    assert rows[0]["layer"] == coarse and rows[0]["logits"] > 3 * rows[1]["logits"] > 0
    assert {row["layer"] for row in rows} == set(few)


def test_the_worst_layers_are_left_out_until_the_budget_is_met():
    ranking = [{"layer": str(i)} for i in range(10)]
    tried = []

    def ap_of(layers):
        tried.append(10 - len(layers))
        assert layers == [str(i) for i in range(10 - len(layers), 10)]
        return 0.5 + 0.02 * (10 - len(layers))

    layers = quantize.within_budget(ranking, ap_of, 0.55, lambda stage: None)
    assert layers == [str(i) for i in range(4, 10)] and tried == [0, 1, 2, 4]
    with pytest.raises(ld.LiteDetrError, match="AP is 0.6600 with 2 of 10 layers in INT8, and 0.9000 is wanted"):
        quantize.within_budget(ranking, ap_of, 0.9, lambda stage: None)


@pytest.mark.slow
def test_an_export_within_an_ap_budget(tmp_path, monkeypatch):
    """AP of a graph with the input of the first layer squashed is low, and the layer is the one that is left out."""
    monkeypatch.setattr(quantize, "sensitivity", lambda *_: [{"layer": name} for name in sorted(found)])
    found, worst = set(), "detector.backbone.conv1/Conv"
    original = quantize.layers
    monkeypatch.setattr(quantize, "layers", lambda *arguments: found.update(original(*arguments)) or sorted(found))
    asked = []

    def ap(onnx_model, model, ap_of):
        counts = precision.count(onnx_model)
        asked.append(counts["int8"])
        quantized = any(
            node.name == worst
            and node.inputs[0].producer() is not None
            and node.inputs[0].producer().op_type == "DequantizeLinear"
            for node in onnx_model.graph
        )
        return 0.1 if quantized else 0.5

    monkeypatch.setattr(export, "_ap", ap)
    report = ld.export_onnx(
        traced()[0], tmp_path / "model.onnx", precision="int8", image_size=SIZE, verify=False,
        int8=limits.Int8([scene(0, 3)[0]], method="minmax", ap_budget=0.01, ap_of=lambda session: 0.0),
    )  # fmt: skip
    assert asked == [0, len(found), len(found) - 1]
    assert report.metadata["int8_left_out"] == [worst] and report.nodes["int8"] == len(found) - 1


def test_a_quantized_graph_is_refused(names, ranges, quantized):
    with pytest.raises(ld.LiteDetrError, match="typed already"):
        quantize.apply(quantized, names, ranges)


def test_images_are_spread_over_the_folder(tmp_path):
    for i in range(7):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    assert [path.stem for path in limits.Int8(tmp_path, 3).chosen()] == ["0", "2", "4"]
    assert len(limits.Int8(tmp_path).chosen()) == 7
    with pytest.raises(ld.LiteDetrError, match="there are 7 calibration images .*8 are asked"):
        limits.Int8(tmp_path, 8).check()
    with pytest.raises(ld.LiteDetrError, match="it must be 1 or more"):
        limits.Int8(tmp_path, 0).check()


@pytest.mark.parametrize(
    "options,says",
    [
        (["--precision", "int8"], "holds no image"),
        (["--precision", "fp16"], "are for precision 'int8'"),
        (["--precision", "int8", "--calibration-method", "mean"], "calibration method is 'mean'"),
        (["--precision", "fp8"], "precision is 'fp8'"),
        (["--precision", "fp16", "--target", "cpu"], "precision is 'fp16' and target 'cpu'"),
        (["--precision", "int8", "--target", "npu"], "target is 'npu'"),
        (["--precision", "int8", "--ap-budget", "2", "--shapes"], "AP budget is 2"),
        (["--precision", "int8", "--ap-budget", "0.01"], "needs annotated images"),
        (["--precision", "int8", "--shapes", "--data", "coco"], "leave one out"),
        (["--precision", "int8", "--shapes"], "what --ap-budget is measured on"),
        (["--precision", "fp16", "--ap-budget", "0.01", "--shapes"], "are for precision 'int8'"),
    ],
)
def test_wrong_use(options, says, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"weights")
    (tmp_path / "empty").mkdir()
    arguments = ["export", str(tmp_path / "weights.pth"), "-o", str(tmp_path / "model.onnx")]
    result = CliRunner().invoke(cli.app, [*arguments, "--calibration", str(tmp_path / "empty"), *options])
    assert result.exit_code == 2 and says in result.stderr


def test_int8_without_images(tmp_path):
    with pytest.raises(ld.LiteDetrError, match="sensitivity.* need the images"):
        ld.export_onnx(traced()[0], tmp_path / "model.onnx", precision="int8", int8=limits.Int8(sensitivity=True))
    with pytest.raises(ld.LiteDetrError, match="model.calibration.json does not exist"):
        ld.export_onnx(traced()[0], tmp_path / "model.onnx", precision="int8")
