"""Inputs for the two attention ops, and how far from the float64 reference an implementation may be."""

import functools
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import onnx
import onnxruntime
import torch
from hypothesis import settings
from torch import Tensor

from litedetr_deploy.ops import native, reference, schema, torch_op

# Not random: a failure in CI is the change's, not the day's.
quick = functools.partial(settings, deadline=None, derandomize=True)

MAPS = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4)


@dataclass(frozen=True)
class Shape:
    """What decides the shapes and types of a case, and how its numbers are spread."""

    key: str = "shared"  # 'shared', 'own', or 'none': the plain op
    batch: int = 2
    queries: int = 5
    heads: int = 2
    head_dim: int = 8
    maps: list = field(default_factory=lambda: [(5, 7), (3, 4), (1, 1)])  # (height, width), fine to coarse
    points: int = 4
    width: int = 2  # of the references
    spread: float = 2.0  # of the offsets: pixels, or half boxes
    on_grid: bool = False  # samples on pixel centres, pixel edges and borders only, exact in every dtype
    dtype: torch.dtype = torch.float32
    float_offsets: bool = False
    seed: int = 0

    @property
    def op_type(self) -> str:
        return schema.PLAIN if self.key == "none" else schema.KEY_AWARE


def shapes(**fixed) -> st.SearchStrategy[Shape]:
    """Shapes of all kinds, less what is fixed; a value that is a strategy is drawn."""
    drawn = {
        "key": st.sampled_from(["shared", "own", "none"]),
        "batch": st.integers(1, 3),
        "queries": st.integers(1, 9),
        "heads": st.sampled_from([1, 2, 3, 8]),
        "head_dim": st.sampled_from([4, 8, 12, 16, 32]),
        "maps": MAPS,
        "points": st.sampled_from([1, 2, 3, 4, 8]),
        "width": st.sampled_from([2, 4]),
        "spread": st.sampled_from([0.0, 1.0, 3.0, 40.0]),
        "float_offsets": st.booleans(),
        "seed": st.integers(0, 2**31),
    }
    drawn |= {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
    return st.builds(Shape, **drawn)


def make_inputs(shape: Shape) -> dict[str, Tensor]:
    """The op's inputs, in order."""
    generator = torch.Generator().manual_seed(shape.seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    n, q, m, p = shape.batch, shape.queries, shape.heads, shape.points
    levels, channels = len(shape.maps), shape.heads * shape.head_dim
    tokens = sum(height * width for height, width in shape.maps)
    query = normal(n, q, m * levels * p if shape.key == "none" else channels)
    references = torch.rand(n, q, levels, shape.width, generator=generator) * 1.2 - 0.1
    offsets = normal(n, q, m * levels * p * 2) * shape.spread
    if shape.on_grid:  # with maps and point counts of powers of two, every coordinate is a short binary fraction
        references = (references * 16).round() / 16
        offsets = (offsets * 4).round() / 4
    inputs = {
        "attention_logits" if shape.key == "none" else "query": query.to(shape.dtype),
        "value": normal(n, tokens, channels).to(shape.dtype),
        "reference_points": references,
        "sampling_offsets": offsets if shape.float_offsets else offsets.to(shape.dtype),
        "spatial_shapes": torch.tensor(shape.maps),
    }
    if shape.key == "own":
        inputs["key"] = normal(n, tokens, channels).to(shape.dtype)
    return inputs


def run_reference(shape: Shape, inputs: dict[str, Tensor], dtype: torch.dtype | None = torch.float64) -> Tensor:
    """The definition in `dtype`; None: in the types of the inputs."""
    function = {schema.KEY_AWARE: reference.key_aware_deform_attn, schema.PLAIN: reference.ms_deform_attn}
    cast = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in inputs.items()}
    return function[shape.op_type](**cast, num_heads=shape.heads, num_points=shape.points)


def run_torch(shape: Shape, inputs: dict[str, Tensor]) -> Tensor:
    function = {
        schema.KEY_AWARE: torch.ops.litedetr.key_aware_deform_attn,
        schema.PLAIN: torch.ops.litedetr.ms_deform_attn,
    }
    return function[shape.op_type](**inputs, num_heads=shape.heads, num_points=shape.points)


def run_session(session: onnxruntime.InferenceSession, inputs: dict[str, Tensor]) -> Tensor:
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(output)


def make_session(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors come as exceptions; ONNX Runtime prints them as well
    options.register_custom_ops_library(str(native.library("onnxruntime")))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def make_op_model(shape: Shape, version: int = schema.VERSION, **attributes: int | str) -> onnx.ModelProto:
    """A model of one node, every size dynamic; `version`: of the domain that it imports."""
    element = {
        torch.float32: onnx.TensorProto.FLOAT,
        torch.float16: onnx.TensorProto.FLOAT16,
        torch.bfloat16: onnx.TensorProto.BFLOAT16,
    }
    types = {"T": element[shape.dtype], "F": onnx.TensorProto.FLOAT, "I": onnx.TensorProto.INT64}
    types["U"] = onnx.TensorProto.FLOAT if shape.float_offsets else element[shape.dtype]
    inputs = [
        onnx.helper.make_tensor_value_info(
            name, types[letter], [f"{name}_{axis}" for axis in range(len(schema.SHAPES[name]))]
        )
        for name, letter, optional in schema.INPUTS[shape.op_type]
        if not optional or shape.key == "own"
    ]
    node = onnx.helper.make_node(
        shape.op_type,
        [value.name for value in inputs],
        [schema.OUTPUT],
        domain=schema.DOMAIN,
        **{"num_heads": shape.heads, "num_points": shape.points, **schema.PLUGIN_ATTRIBUTES, **attributes},
    )
    output = onnx.helper.make_tensor_value_info(schema.OUTPUT, types["T"], [None] * 3)
    graph = onnx.helper.make_graph([node], "one op", inputs, [output])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid(schema.DOMAIN, version)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)


class OneOp(torch.nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape

    def forward(self, *inputs):
        names = [name for name, _, _ in schema.INPUTS[self.shape.op_type]]
        return run_torch(self.shape, dict(zip(names, inputs, strict=False)))


def export(shape: Shape, attention: str, opset: int = 17) -> onnx.ModelProto:
    """The op as `torch.onnx.export` writes it: N, Q, S and the map sizes dynamic, the rest fixed."""
    inputs = make_inputs(shape)
    dynamic = torch.export.Dim.DYNAMIC
    axes = {"value": {0: dynamic, 1: dynamic}, "key": {0: dynamic, 1: dynamic}, "spatial_shapes": {}}
    program = torch.onnx.export(
        OneOp(shape).eval(),
        tuple(inputs.values()),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(tuple(axes.get(name, {0: dynamic, 1: dynamic}) for name in inputs),),
        custom_translation_table=torch_op.onnx_translations(attention),
        input_names=list(inputs),
        verbose=False,
    )
    return program.model_proto


@functools.cache
def exported_session(attention: str, key: str, width: int, dtype: torch.dtype) -> onnxruntime.InferenceSession:
    """One session for all the cases of one kind: exporting takes a second."""
    return make_session(export(exported_shape(key, width, dtype), attention))


def exported_shape(key: str, width: int, dtype: torch.dtype) -> Shape:
    return Shape(key=key, width=width, dtype=dtype)


def tolerance(shape: Shape, inputs: dict[str, Tensor], wanted: Tensor) -> float:
    """The error allowed against the float64 reference.

    Three times the error that PyTorch makes in the types of the inputs, and what a lucky PyTorch must not take away:
    one rounding of the output, and the float roundings that every implementation has.  Those are of a pixel
    coordinate, which moves a sample by at most the difference of two neighbours, and of a logit, a sum of D products,
    which moves the weights in proportion.
    """
    pytorch = (run_reference(shape, inputs, None).double() - wanted).abs().max().item()
    value = inputs["value"].double().abs().max().item()
    largest_side = max(map(max, shape.maps))
    offset = inputs["sampling_offsets"].double().nan_to_num(0.0).abs().max().item()
    if shape.width == 4:
        offset *= largest_side / shape.points
    pixel = 2 * largest_side + min(offset, 2 * largest_side)
    logit = 1.0
    if shape.op_type == schema.KEY_AWARE:
        key = inputs.get("key", inputs["value"]).double().abs().max().item()
        logit += shape.head_dim**0.5 * inputs["query"].double().abs().max().item() * key
    rounding = torch.finfo(torch.float32).eps * (pixel + logit)
    return 3 * pytorch + value * (torch.finfo(shape.dtype).eps / 2 + 4 * rounding)


def assert_right(shape: Shape, inputs: dict[str, Tensor], output: Tensor) -> None:
    wanted = run_reference(shape, inputs)
    assert output.shape == wanted.shape
    assert output.dtype == shape.dtype
    error = (output.double() - wanted).abs().max().item()
    allowed = tolerance(shape, inputs, wanted)
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"


NONFINITE = st.sampled_from([np.nan, np.inf, -np.inf])
POWERS = st.sampled_from([1, 2, 4, 8])
POWER_MAPS = st.lists(st.tuples(POWERS, POWERS), min_size=1, max_size=3)


@st.composite
def nonfinite_cases(draw, **fixed) -> tuple[Shape, dict[str, Tensor]]:
    """Cases with up to three tokens of value (and key) that hold NaN or Inf in one channel.

    Every coordinate is exact, so whether a corner of weight zero is inside its map is the same in all dtypes.
    """
    fixed = {"points": st.sampled_from([1, 2, 4]), **fixed}
    shape = draw(shapes(**{"maps": POWER_MAPS, "spread": st.sampled_from([0.0, 1.0, 3.0]), "on_grid": True, **fixed}))
    inputs = make_inputs(shape)
    for name in ("value", "key"):
        if name in inputs:
            _, tokens, channels = inputs[name].shape
            for _ in range(draw(st.integers(1, 3))):
                token, channel = draw(st.integers(0, tokens - 1)), draw(st.integers(0, channels - 1))
                inputs[name][0, token, channel] = draw(NONFINITE)
    return shape, inputs


def assert_spreads_right(shape: Shape, inputs: dict[str, Tensor], output: Tensor) -> None:
    """NaN and Inf reach the outputs that they reach in the reference, and no other."""
    wanted = run_reference(shape, inputs)
    assert torch.equal(output.isfinite(), wanted.isfinite())


def put_samples_nowhere(inputs: dict[str, Tensor], name: str, number: float) -> None:
    """Write `number` into some of 'reference_points' or 'sampling_offsets': x and y, centre and box in turn."""
    coordinates = inputs[name].view(-1)
    coordinates[::5] = number


def repeat_rows(inputs: dict[str, Tensor], times: int) -> dict[str, Tensor]:
    """The first row of the batch, `times` times."""
    return {
        name: tensor if name == "spatial_shapes" else tensor[:1].repeat(times, *[1] * (tensor.dim() - 1))
        for name, tensor in inputs.items()
    }


# A tensor of Shape(key="own") and one that does not fit in its place, and what an op says of it.
WRONG_TENSORS = [
    ("query", torch.zeros(2, 5, 15), r"query has shape \[2, 5, 15\]; it should be \[2, 5, 16\]"),
    ("value", torch.zeros(2, 48, 15), "value has 15 channels; they should divide by the 2 heads"),
    ("key", torch.zeros(2, 47, 16), r"key has shape \[2, 47, 16\]; it should be \[2, 48, 16\]"),
    ("reference_points", torch.zeros(2, 5, 3, 3), r"reference_points has a last dimension of 3; .* 2 \(x, y\) or 4"),
    ("reference_points", torch.zeros(2, 4, 3, 2), r"reference_points has shape \[2, 4, 3, 2\]; .* \[2, 5, 3, 2\]"),
    ("sampling_offsets", torch.zeros(2, 5, 46), r"sampling_offsets has shape \[2, 5, 46\]; .* \[2, 5, 48\]"),
    ("spatial_shapes", torch.tensor([[5, 7], [3, 4], [2, 1]]), "48 tokens"),
    ("spatial_shapes", torch.ones(3, 3).long(), r"spatial_shapes has shape \[3, 3\]; it should be \[3, 2\]"),
    ("spatial_shapes", torch.ones(9, 2).long(), r"reference_points has shape \[2, 5, 3, 2\]; .* \[2, 5, 9, 2\]"),
]
