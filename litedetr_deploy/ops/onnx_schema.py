"""The ops as ONNX operator schemas: what lets onnx check a model that holds them and infer its shapes."""

import onnx
from onnx.defs import OpSchema

from . import schema

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_CONCRETE = {"F": "tensor(float)", "I": "tensor(int64)"}


def register() -> None:
    """Make both ops known to onnx; a second call changes nothing."""
    for op_type in schema.INPUTS:
        if not onnx.defs.has(op_type, schema.VERSION, schema.DOMAIN):
            onnx.defs.register_schema(_operator_schema(op_type))


def _operator_schema(op_type: str) -> OpSchema:
    options = {True: OpSchema.FormalParameterOption.Optional, False: OpSchema.FormalParameterOption.Single}
    numbers = [OpSchema.Attribute(name, OpSchema.AttrType.INT, required=True) for name in schema.ATTRIBUTES]
    texts = {name: onnx.helper.make_attribute(name, text) for name, text in schema.PLUGIN_ATTRIBUTES.items()}
    inputs = [
        OpSchema.FormalParameter(name, _CONCRETE.get(letter, letter), param_option=options[optional])
        for name, letter, optional in schema.INPUTS[op_type]
    ]
    operator = OpSchema(
        op_type, schema.DOMAIN, schema.VERSION,
        inputs=inputs, outputs=[OpSchema.FormalParameter(schema.OUTPUT, "T")],
        type_constraints=[(letter, _FLOATS, "") for letter in ("T", "U")],
        attributes=[*numbers, *(OpSchema.Attribute(name, default) for name, default in texts.items())],
    )  # fmt: skip
    operator.set_type_and_shape_inference_function(_infer_shape)
    return operator


def _infer_shape(context: onnx.shape_inference.InferenceContext) -> None:
    """The output has the element type and M*D of the value, N and Q of the first input."""
    query, value = context.get_input_type(0), context.get_input_type(1)
    output = onnx.TypeProto()
    output.tensor_type.elem_type = value.tensor_type.elem_type
    if query.tensor_type.HasField("shape") and value.tensor_type.HasField("shape"):
        n, q, _ = query.tensor_type.shape.dim
        _, _, channels = value.tensor_type.shape.dim
        output.tensor_type.shape.dim.extend([n, q, channels])
    context.set_output_type(0, output)
