"""The two attention ops in PyTorch, `torch.ops.litedetr.*`, and their translation to ONNX.

    torch.ops.litedetr.key_aware_deform_attn(query, value, reference_points, sampling_offsets, spatial_shapes,
                                             num_heads, num_points, key=None)
    torch.ops.litedetr.ms_deform_attn(attention_logits, value, reference_points, sampling_offsets, spatial_shapes,
                                      num_heads, num_points)

Shapes and types are those of `schema.INPUTS`; `reference` defines what they compute.  On CUDA all tensors are on one
device, spatial_shapes too, and nothing waits for the device, so that a call can be captured in a CUDA graph.

Both can be trained.  On the CPU in float32 the gradients are the native library's; elsewhere PyTorch differentiates
`reference`, which is right and slow.  Under CPU autocast both compute in float32.

Importing this module registers the ops; the native library is loaded by the first call.
"""

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import native, reference, schema

_DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}
_MESSAGE_SIZE = 512
_CUDA_ALIGNMENT = 16  # bytes; kda_cuda_check in plugins/kda/cuda.cpp
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
    inputs = (query, value, reference_points, sampling_offsets, spatial_shapes, key)
    return _run_cpu(schema.KEY_AWARE, _checked(schema.KEY_AWARE, inputs, num_heads, num_points), num_heads, num_points)


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
    inputs = (attention_logits, value, reference_points, sampling_offsets, spatial_shapes)
    return _run_cpu(schema.PLAIN, _checked(schema.PLAIN, inputs, num_heads, num_points), num_heads, num_points)


@key_aware_deform_attn.register_kernel("cuda")
def _(query, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points, key=None) -> Tensor:
    inputs = (query, value, reference_points, sampling_offsets, spatial_shapes, key)
    return _run_cuda(schema.KEY_AWARE, _checked(schema.KEY_AWARE, inputs, num_heads, num_points), num_heads, num_points)


@ms_deform_attn.register_kernel("cuda")
def _(attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points) -> Tensor:
    inputs = (attention_logits, value, reference_points, sampling_offsets, spatial_shapes)
    return _run_cuda(schema.PLAIN, _checked(schema.PLAIN, inputs, num_heads, num_points), num_heads, num_points)


@key_aware_deform_attn.register_fake
def _(query, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points, key=None) -> Tensor:
    inputs = (query, value, reference_points, sampling_offsets, spatial_shapes, key)
    return _empty_output(_checked(schema.KEY_AWARE, inputs, num_heads, num_points))


@ms_deform_attn.register_fake
def _(attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points) -> Tensor:
    inputs = (attention_logits, value, reference_points, sampling_offsets, spatial_shapes)
    return _empty_output(_checked(schema.PLAIN, inputs, num_heads, num_points))


@torch.library.custom_op(f"{schema.DOMAIN}::deform_attn_backward", mutates_args=(), device_types="cpu")
def deform_attn_backward(
    output_gradient: Tensor,
    queries: Tensor,
    value: Tensor,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    spatial_shapes: Tensor,
    key: Tensor | None,
    num_heads: int,
    num_points: int,
    key_aware: bool,
    references_wanted: bool,
) -> list[Tensor]:
    """The native backward pass of both ops, for float32 tensors: `queries` are the attention logits of the plain op.

    Returns:
        The gradients of queries, value and sampling_offsets, of reference_points where wanted, of key where there is
        one.
    """
    op_type = schema.KEY_AWARE if key_aware else schema.PLAIN
    inputs = (queries, value, reference_points, sampling_offsets, spatial_shapes, key)[: len(schema.INPUTS[op_type])]
    names = [name for name, _, _ in schema.INPUTS[op_type]]
    tensors = {name: t.contiguous() for name, t in zip(names, inputs, strict=True) if t is not None}
    output_gradient = output_gradient.contiguous()
    gradients = _empty_gradients(queries, value, reference_points, sampling_offsets, key, references_wanted)
    places = iter(gradients)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    status = native.load_backward().kda_cpu_backward(
        _arguments(op_type, tensors, num_heads, num_points, output_gradient),
        native.Gradients(
            output=output_gradient.data_ptr(),
            query=next(places).data_ptr(),
            value=next(places).data_ptr(),
            sampling_offsets=next(places).data_ptr(),
            reference_points=next(places).data_ptr() if references_wanted else None,
            key=next(places).data_ptr() if key is not None else None,
        ),
        _torch_threads(),
        message,
        _MESSAGE_SIZE,
    )
    _raise_unless_ok(status, op_type, message)
    return gradients


@deform_attn_backward.register_fake
def _(
    output_gradient,
    queries,
    value,
    reference_points,
    sampling_offsets,
    spatial_shapes,
    key,
    num_heads,
    num_points,
    key_aware,
    references_wanted,
) -> list[Tensor]:
    return _empty_gradients(queries, value, reference_points, sampling_offsets, key, references_wanted)


def _empty_gradients(
    queries: Tensor, value: Tensor, references: Tensor, offsets: Tensor, key: Tensor | None, references_wanted: bool
) -> list[Tensor]:
    owners = [queries, value, offsets, *([references] if references_wanted else []), *([] if key is None else [key])]
    return [torch.empty_like(owner, memory_format=torch.contiguous_format) for owner in owners]


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.num_points = inputs[:7]
    ctx.save_for_backward(*tensors, *(key for key in inputs[7:] if key is not None))


def _differentiate(op_type: str, ctx, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of an op's arguments, in their order; None where none is wanted or can be."""
    tensors = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad[:5], *ctx.needs_input_grad[7:])[: len(tensors)]
    native_here = tensors[1].device.type == "cpu" and tensors[1].dtype == torch.float32
    differentiate = _differentiate_natively if native_here else _differentiate_reference
    gradients = differentiate(op_type, output_gradient, tensors, wanted, ctx.num_heads, ctx.num_points)
    gradients = [gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)]
    return (*gradients[:5], None, None, *(gradients[5:] or [None]))


def _differentiate_natively(op_type, output_gradient, tensors, wanted, num_heads, num_points) -> list[Tensor | None]:
    key = tensors[5] if len(tensors) > 5 else None
    queries, value, offsets, *rest = deform_attn_backward(
        output_gradient, *tensors[:5], key, num_heads, num_points, op_type == schema.KEY_AWARE, wanted[2]
    )
    references = rest.pop(0) if wanted[2] else None
    return [queries, value, references, offsets, None, *rest]


def _differentiate_reference(op_type, output_gradient, tensors, wanted, num_heads, num_points) -> list[Tensor | None]:
    attend = reference.key_aware_deform_attn if op_type == schema.KEY_AWARE else reference.ms_deform_attn
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
        output = attend(*leaves[:5], num_heads, num_points, *leaves[5:])
    gradients = iter(torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], output_gradient))
    return [next(gradients) if want else None for want in wanted]


key_aware_deform_attn.register_autograd(
    functools.partial(_differentiate, schema.KEY_AWARE), setup_context=_save_for_backward
)
ms_deform_attn.register_autograd(functools.partial(_differentiate, schema.PLAIN), setup_context=_save_for_backward)
for _op in (key_aware_deform_attn, ms_deform_attn):
    _op.register_autocast("cpu", torch.float32)


def _empty_output(tensors: dict[str, Tensor]) -> Tensor:
    queries, value = next(iter(tensors.values())), tensors["value"]
    return value.new_empty(queries.shape[0], queries.shape[1], value.shape[2])


def _checked(op_type: str, inputs: tuple[Tensor | None, ...], num_heads: int, num_points: int) -> dict[str, Tensor]:
    """The inputs that are there, by name, after all checks that shapes and types alone allow; sizes may be symbolic.
    What the values of spatial_shapes tell is checked by the kernel."""
    named = zip(schema.INPUTS[op_type], inputs, strict=True)
    tensors = {name: tensor for (name, _, _), tensor in named if tensor is not None}
    _require(
        num_heads > 0 and num_points > 0,
        lambda: f"num_heads is {num_heads} and num_points is {num_points}; both should be at least 1",
    )
    _check_types(op_type, tensors)
    queries = next(iter(tensors.values()))
    value, references, spatial_shapes = tensors["value"], tensors["reference_points"], tensors["spatial_shapes"]
    n, s, channels = value.shape
    q, num_levels = queries.shape[1], spatial_shapes.shape[0]
    _require(
        channels % num_heads == 0, lambda: f"value has {channels} channels; they should divide by the {num_heads} heads"
    )
    _require(
        references.shape[3] in (2, 4),
        lambda: f"reference_points has shape {_text(references.shape)}; the last size should be 2 or 4",
    )
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
        if name in wanted:
            for size, wanted_size in zip(tensor.shape, wanted[name], strict=True):
                _require(
                    size == wanted_size,
                    lambda: f"{name} has shape {_text(tensor.shape)}; it should be {_text(wanted[name])}",
                )
    return tensors


def _check_types(op_type: str, tensors: dict[str, Tensor]) -> None:
    """Ranks and element types."""
    dtype = tensors["value"].dtype
    allowed = {
        "T": (dtype,) if dtype in _DTYPES else tuple(_DTYPES),
        "U": (dtype, torch.float32),
        "F": (torch.float32,),
        "I": (torch.int64,),
    }
    ranks = {"reference_points": 4, "spatial_shapes": 2}
    letters = {name: letter for name, letter, _ in schema.INPUTS[op_type]}
    for name, tensor in tensors.items():
        rank, letter = ranks.get(name, 3), letters[name]
        _require(
            tensor.dim() == rank, lambda: f"{name} has shape {_text(tensor.shape)}; it should have {rank} dimensions"
        )
        wanted = " or ".join(_name(dtype) for dtype in dict.fromkeys(allowed[letter]))
        _require(tensor.dtype in allowed[letter], lambda: f"{name} is {_name(tensor.dtype)}; it should be {wanted}")


def _require(condition: bool, message: Callable[[], str]) -> None:
    if condition is not True:  # False, or a comparison of symbolic sizes
        torch._check_value(condition, message)


def _text(shape: tuple) -> str:
    return str(list(shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _run_cpu(op_type: str, tensors: dict[str, Tensor], num_heads: int, num_points: int) -> Tensor:
    core = native.load_core()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    output = _empty_output(tensors)
    arguments = _arguments(op_type, tensors, num_heads, num_points, output)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    status = core.kda_cpu_check(arguments, message, _MESSAGE_SIZE)
    if status == native.OK:
        workspace = _workspace(core.kda_cpu_workspace_size(arguments))
        status = core.kda_cpu_forward(arguments, workspace.data_ptr(), _torch_threads(), message, _MESSAGE_SIZE)
    _raise_unless_ok(status, op_type, message)
    return output


def _run_cuda(op_type: str, tensors: dict[str, Tensor], num_heads: int, num_points: int) -> Tensor:
    """On PyTorch's current stream of the tensors' device."""
    device = _common_cuda_device(tensors)
    core = native.load_cuda()
    tensors = {name: _contiguous_and_aligned(tensor) for name, tensor in tensors.items()}
    output = _empty_output(tensors)
    arguments = _arguments(op_type, tensors, num_heads, num_points, output)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        status = core.kda_cuda_forward(arguments, stream, message, _MESSAGE_SIZE)
    _raise_unless_ok(status, op_type, message)
    return output


def _common_cuda_device(tensors: dict[str, Tensor]) -> torch.device:
    device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)  # one is, or this would not run
    for name, tensor in tensors.items():
        _require(
            tensor.device == device,
            lambda: (
                f"{name} is on {tensor.device}; it should be on {device}, where the others are: {name}.to('{device}')"
            ),
        )
    return device


def _contiguous_and_aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()  # a slice can be contiguous and start anywhere
    return tensor if tensor.data_ptr() % _CUDA_ALIGNMENT == 0 else tensor.clone()


def _arguments(
    op_type: str, tensors: dict[str, Tensor], num_heads: int, num_points: int, output: Tensor
) -> native.Arguments:
    queries, value = next(iter(tensors.values())), tensors["value"]
    return native.Arguments(
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


def _raise_unless_ok(status: int, op_type: str, message: ctypes.Array) -> None:
    if status != native.OK:
        error = ValueError if status == native.INVALID_ARGUMENT else RuntimeError
        raise error(f"{op_type}: {message.value.decode()}")


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
    return native.Executor(
        run=ctypes.cast(native.load_core().kda_run_parallel_for, ctypes.c_void_p),
        self=ctypes.cast(libtorch.torch_parallel_for, ctypes.c_void_p),
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
        query, value, reference_points, sampling_offsets, spatial_shapes, num_heads: int, num_points: int, key=None
    ):
        return write(
            schema.KEY_AWARE,
            (query, value, reference_points, sampling_offsets, spatial_shapes, key),
            num_heads,
            num_points,
        )

    def write_plain(
        attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads: int, num_points: int
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
