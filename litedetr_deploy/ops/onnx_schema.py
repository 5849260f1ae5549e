"""The ops as ONNX operator schemas: what lets onnx check a model that holds them and infer its shapes."""

import onnx
from onnx import TensorProto
from onnx.defs import OpSchema

from . import schema

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {"T": _FLOATS, "U": _FLOATS}
_CONCRETE = {"F": "tensor(float)", "I": "tensor(int64)"}


def register() -> None:
    """Make both ops known to onnx; a second call changes nothing."""
    for op_type, inputs in schema.INPUTS.items():
        if not onnx.defs.has(op_type, schema.VERSION, schema.DOMAIN):
            onnx.defs.register_schema(_operator_schema(op_type, inputs))


def _operator_schema(op_type: str, inputs: tuple) -> OpSchema:
    option = OpSchema.FormalParameterOption
    used = [letter for _, letter, _ in inputs]
    operator = OpSchema(
        op_type,
        schema.DOMAIN,
        schema.VERSION,
        inputs=[
            OpSchema.FormalParameter(
                name, _CONCRETE.get(letter, letter), param_option=option.Optional if optional else option.Single
            )
            for name, letter, optional in inputs
        ],
        outputs=[OpSchema.FormalParameter(schema.OUTPUT, "T")],
        type_constraints=[(letter, types, "") for letter, types in _TYPES.items() if letter in used],
        attributes=[
            *(OpSchema.Attribute(name, OpSchema.AttrType.INT, required=True) for name in schema.ATTRIBUTES),
            *(
                OpSchema.Attribute(name, onnx.helper.make_attribute(name, default))
                for name, default in schema.PLUGIN_ATTRIBUTES.items()
            ),
        ],
    )
    operator.set_type_and_shape_inference_function(_infer_shape)
    return operator


def _infer_shape(context: onnx.shape_inference.InferenceContext) -> None:
    """output [N, Q, M*D]: the element type, N and M*D of value, the Q of the first input."""
    query, value = context.get_input_type(0), context.get_input_type(1)
    output = onnx.TypeProto()
    output.tensor_type.elem_type = value.tensor_type.elem_type or TensorProto.UNDEFINED
    if query.tensor_type.HasField("shape") and value.tensor_type.HasField("shape"):
        n, q, _ = query.tensor_type.shape.dim
        _, _, channels = value.tensor_type.shape.dim
        output.tensor_type.shape.dim.extend([n, q, channels])
    context.set_output_type(0, output)
