"""The two attention ops in PyTorch, `torch.ops.litedetr.*`, and their translation to ONNX.

    torch.ops.litedetr.key_aware_deform_attn(query, value, reference_points, sampling_offsets, spatial_shapes,
                                             num_heads, num_points, key=None)
    torch.ops.litedetr.ms_deform_attn(attention_logits, value, reference_points, sampling_offsets, spatial_shapes,
                                      num_heads, num_points)

Shapes and types are those of `schema.INPUTS`; `reference` defines what they compute.  For inference: a backward
pass raises.  Importing this module registers the ops; the native library is loaded by the first call.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import native, schema

_DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}
_MESSAGE_SIZE = 512
_thread = threading.local()


@torch.library.custom_op(f"{schema.DOMAIN}::key_aware_deform_attn", mutates_args=(), device_types="cpu")
def key_aware_deform_attn(
    query: Tensor,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Tensor,
    num_heads: int,
    num_points: int,
    key: Tensor | None = None,
) -> Tensor:
    """[N, Q, M*D]; see the module's docstring.

    Raises:
        ValueError: a shape or a type does not fit; the message names the tensor.
        RuntimeError: the native library is missing, or cannot do what was asked.
    """
    tensors = {"query": query, "value": value, "reference_points": reference_points}
    tensors |= {"sampling_offsets": sampling_offsets, "spatial_shapes": spatial_shapes, "key": key}
    _check_shapes(schema.KEY_AWARE, tensors, num_heads, num_points)
    return _run_cpu(schema.KEY_AWARE, tensors, num_heads, num_points)


@torch.library.custom_op(f"{schema.DOMAIN}::ms_deform_attn", mutates_args=(), device_types="cpu")
def ms_deform_attn(
    attention_logits: Tensor,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Tensor,
    num_heads: int,
    num_points: int,
) -> Tensor:
    """[N, Q, M*D]; see the module's docstring.  Raises as `key_aware_deform_attn` does."""
    tensors = {"attention_logits": attention_logits, "value": value, "reference_points": reference_points}
    tensors |= {"sampling_offsets": sampling_offsets, "spatial_shapes": spatial_shapes}
    _check_shapes(schema.PLAIN, tensors, num_heads, num_points)
    return _run_cpu(schema.PLAIN, tensors, num_heads, num_points)


@key_aware_deform_attn.register_fake
def _(
    query, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points, key=None
) -> Tensor:
    tensors = {"query": query, "value": value, "reference_points": reference_points}
    tensors |= {"sampling_offsets": sampling_offsets, "spatial_shapes": spatial_shapes, "key": key}
    _check_shapes(schema.KEY_AWARE, tensors, num_heads, num_points)
    return _empty_output(query, value)


@ms_deform_attn.register_fake
def _(
    attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points
) -> Tensor:
    tensors = {"attention_logits": attention_logits, "value": value, "reference_points": reference_points}
    tensors |= {"sampling_offsets": sampling_offsets, "spatial_shapes": spatial_shapes}
    _check_shapes(schema.PLAIN, tensors, num_heads, num_points)
    return _empty_output(attention_logits, value)


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(query.shape[0], query.shape[1], value.shape[2])


def _check_shapes(op_type: str, tensors: dict[str, Tensor | None], num_heads: int, num_points: int) -> None:
    """Everything that shapes and types alone can tell; sizes may be symbolic.  What the values of spatial_shapes
    tell is checked by the kernel."""
    queries = next(iter(tensors.values()))
    value, references, shapes = tensors["value"], tensors["reference_points"], tensors["spatial_shapes"]
    _require(num_heads > 0 and num_points > 0, lambda: f"num_heads is {num_heads} and num_points {num_points}; both should be positive")

    for name, letter, _ in schema.INPUTS[op_type]:
        tensor = tensors[name]
        if tensor is None:
            continue
        rank = {"reference_points": 4, "spatial_shapes": 2}.get(name, 3)
        _require(tensor.dim() == rank, lambda: f"{name} has shape {_shape(tensor)}; it should have {rank} dimensions")
        allowed = {
            "T": (value.dtype,) if value.dtype in _DTYPES else tuple(_DTYPES),
            "U": (value.dtype, torch.float32),
            "F": (torch.float32,),
            "I": (torch.int64,),
        }[letter]
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(allowed))
        _require(
            tensor.dtype in allowed, lambda: f"{name} is {str(tensor.dtype).removeprefix('torch.')}; it should be {wanted}"
        )

    n, s, channels = value.shape
    q, num_levels = queries.shape[1], shapes.shape[0]
    _require(channels % num_heads == 0, lambda: f"value has {channels} channels; they should divide by the {num_heads} heads")
    _require(references.shape[3] in (2, 4), lambda: f"reference_points has shape {_shape(references)}; the last size should be 2 or 4")
    samples = num_heads * num_levels * num_points
    wanted = {
        "query": (n, q, channels),
        "attention_logits": (n, q, samples),
        "key": (n, s, channels),
        "reference_points": (n, q, num_levels, references.shape[3]),
        "sampling_offsets": (n, q, samples * 2),
        "spatial_shapes": (num_levels, 2),
    }
    for name, tensor in tensors.items():
        if tensor is not None and name in wanted:
            for size, want in zip(tensor.shape, wanted[name], strict=True):
                _require(
                    size == want, lambda: f"{name} has shape {_shape(tensor)}; it should be {_shape(wanted[name])}"
                )


def _require(condition: bool, message: Callable[[], str]) -> None:
    if condition is not True:  # False, or a comparison of symbolic sizes
        torch._check_value(condition, message)


def _shape(tensor) -> str:
    return str(list(getattr(tensor, "shape", tensor)))


def _run_cpu(op_type: str, tensors: dict[str, Tensor | None], num_heads: int, num_points: int) -> Tensor:
    core = native.load_core()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    queries, value = next(iter(tensors.values())), tensors["value"]
    output = _empty_output(queries, value)
    arguments = native.Arguments(
        batch=value.shape[0],
        num_queries=queries.shape[1],
        num_tokens=value.shape[1],
        num_heads=num_heads,
        head_dim=value.shape[2] // num_heads,
        num_levels=tensors["spatial_shapes"].shape[0],
        num_points=num_points,
        reference_width=tensors["reference_points"].shape[3],
        key_aware=op_type == schema.KEY_AWARE,
        dtype=_DTYPES[value.dtype],
        offset_dtype=_DTYPES[tensors["sampling_offsets"].dtype],
        output=output.data_ptr(),
        **{name.replace("attention_logits", "query"): tensor.data_ptr() for name, tensor in tensors.items()},
    )
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    status = core.kda_cpu_check(arguments, message, _MESSAGE_SIZE)
    if status == native.OK:
        workspace = _workspace(core.kda_cpu_workspace_size(arguments))
        status = core.kda_cpu_forward(arguments, workspace.data_ptr(), _torch_threads(), message, _MESSAGE_SIZE)
    if status != native.OK:
        error = ValueError if status == native.INVALID_ARGUMENT else RuntimeError
        raise error(f"{op_type}: {message.value.decode()}")
    return output


def _workspace(size: int) -> Tensor:
    """Scratch memory of this thread, kept between calls: the encoder calls six times with the same sizes.
    PyTorch aligns CPU tensors to 64 bytes, which is what the kernel asks for."""
    workspace = getattr(_thread, "workspace", None)
    if workspace is None or workspace.numel() < size:
        workspace = _thread.workspace = torch.empty(size, dtype=torch.uint8)
    return workspace


@functools.cache
def _torch_threads() -> native.Executor:
    """PyTorch's own threads, so that torch.set_num_threads holds here too.  `torch_parallel_for` belongs to
    PyTorch's stable C ABI (torch/csrc/stable/c/shim.h) and has the signature kda_parallel_for."""
    libtorch = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    address = lambda function: ctypes.cast(function, ctypes.c_void_p).value
    return native.Executor(
        run=address(native.load_core().kda_run_parallel_for), self=address(libtorch.torch_parallel_for)
    )


def onnx_translations(attention: str) -> dict[Callable, Callable]:
    """The `custom_translation_table` with which `torch.onnx.export(dynamo=True)` writes both ops.

    Args:
        attention: 'op' writes one node of the domain `litedetr`; 'gather' and 'gridsample' write standard ONNX ops.

    Raises:
        ValueError: another value.
    """
    from . import lowering, onnx_schema

    writers = {"op": _write_node, **lowering.LOWERINGS}
    if attention not in writers:
        raise ValueError(f"attention is {attention!r}; it should be one of {', '.join(map(repr, writers))}")
    if attention == "op":
        onnx_schema.register()
    write = writers[attention]

    # The exporter reads the parameters of these two to match them with the op's.
    def write_key_aware(
        query,
        value,
        reference_points,
        sampling_offsets,
        spatial_shapes,
        num_heads: int,
        num_points: int,
        key=None,
    ):
        return write(
            schema.KEY_AWARE,
            (query, value, reference_points, sampling_offsets, spatial_shapes, key),
            num_heads,
            num_points,
        )

    def write_plain(
        attention_logits,
        value,
        reference_points,
        sampling_offsets,
        spatial_shapes,
        num_heads: int,
        num_points: int,
    ):
        return write(
            schema.PLAIN,
            (attention_logits, value, reference_points, sampling_offsets, spatial_shapes),
            num_heads,
            num_points,
        )

    return {
        torch.ops.litedetr.key_aware_deform_attn.default: write_key_aware,
        torch.ops.litedetr.ms_deform_attn.default: write_plain,
    }


def _write_node(op_type: str, inputs: tuple, num_heads: int, num_points: int):
    from onnxscript.values import Opset

    operator = getattr(Opset(schema.DOMAIN, schema.VERSION), op_type)
    present = [value for value in inputs if value is not None]  # only the last input is optional
    return operator(*present, num_heads=num_heads, num_points=num_points, **schema.PLUGIN_ATTRIBUTES)
