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
    inputs = (query, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points, key)
    return _attend(schema.KEY_AWARE, _run_cpu, *inputs)


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
    inputs = (attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points)
    return _attend(schema.PLAIN, _run_cpu, *inputs)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The native backward pass of both ops, for float32 tensors: `queries` are the attention logits of the plain op.

    Returns:
        The gradients of queries, value, reference_points, sampling_offsets and key; that of reference_points is empty
        where it is not wanted, that of key where there is none.
    """
    op_type = schema.KEY_AWARE if key_aware else schema.PLAIN
    inputs = (queries, value, reference_points, sampling_offsets, spatial_shapes, key)
    tensors = {name: tensor.contiguous() for name, tensor in _named(op_type, inputs).items()}
    output_gradient = output_gradient.contiguous()
    gradients = _empty_gradients(queries, value, reference_points, sampling_offsets, key, references_wanted)
    names = ("query", "value", "reference_points", "sampling_offsets", "key")
    addresses = {name: tensor.data_ptr() or None for name, tensor in zip(names, gradients, strict=True)}
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    status = native.load_core().kda_cpu_backward(
        _arguments(op_type, tensors, num_heads, num_points, output_gradient),
        native.Gradients(output=output_gradient.data_ptr(), **addresses),
        _torch_threads(),
        message,
        _MESSAGE_SIZE,
    )
    _raise_unless_ok(status, op_type, message)
    return gradients


@deform_attn_backward.register_fake
def _empty_backward(output_gradient, queries, value, references, offsets, spatial_shapes, key, *options):
    *_, references_wanted = options
    return _empty_gradients(queries, value, references, offsets, key, references_wanted)


def _empty_gradients(
    queries: Tensor, value: Tensor, references: Tensor, offsets: Tensor, key: Tensor | None, references_wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient_of(owner: Tensor, wanted: bool = True) -> Tensor:
        return torch.empty_like(owner, memory_format=torch.contiguous_format) if wanted else owner.new_empty(0)

    return (
        gradient_of(queries),
        gradient_of(value),
        gradient_of(references, references_wanted),
        gradient_of(offsets),
        value.new_empty(0) if key is None else gradient_of(key),
    )


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
    queries, value, references, offsets, of_key = deform_attn_backward(
        output_gradient, *tensors[:5], key, num_heads, num_points, op_type == schema.KEY_AWARE, wanted[2]
    )
    return [queries, value, references, offsets, None, of_key][: len(tensors)]


def _differentiate_reference(op_type, output_gradient, tensors, wanted, num_heads, num_points) -> list[Tensor | None]:
    attend: Callable = reference.key_aware_deform_attn if op_type == schema.KEY_AWARE else reference.ms_deform_attn
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
        output = attend(*leaves[:5], num_heads, num_points, *leaves[5:])
    gradients = iter(torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], output_gradient))
    return [next(gradients) if want else None for want in wanted]


def _attend(op_type: str, run: Callable, *arguments) -> Tensor:
    """Check the op's arguments, in their order, and `run` on the tensors by name."""
    *inputs, num_heads, num_points = arguments[:7]
    tensors = _checked(op_type, (*inputs, *arguments[7:]), num_heads, num_points)
    return run(op_type, tensors, num_heads, num_points)


def _named(op_type: str, inputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
    """The inputs that are there, by name."""
    names = (name for name, _, _ in schema.INPUTS[op_type])
    return {name: tensor for name, tensor in zip(names, inputs, strict=False) if tensor is not None}


def _checked(op_type: str, inputs: tuple[Tensor | None, ...], num_heads: int, num_points: int) -> dict[str, Tensor]:
    """The inputs that are there, by name, after all checks that shapes and types alone allow; sizes may be symbolic.
    What the kernels support, and the values of spatial_shapes, the native library checks."""
    tensors = _named(op_type, inputs)
    if num_heads < 1 or num_points < 1:
        raise ValueError(f"num_heads is {num_heads} and num_points is {num_points}; both should be at least 1")
    _check_types(op_type, tensors)
    queries, value = next(iter(tensors.values())), tensors["value"]
    references, num_levels = tensors["reference_points"].shape, tensors["spatial_shapes"].shape[0]
    n, s, channels = value.shape
    _require(
        channels % num_heads == 0, "value has {} channels; they should divide by the {} heads", channels, num_heads
    )
    _require(references[3] in (2, 4), "reference_points has shape {}; the last size should be 2 or 4", references)
    samples = num_heads * num_levels * num_points
    sizes = {"N": n, "Q": queries.shape[1], "S": s, "M*D": channels, "R": references[3], "2": 2}
    sizes |= {"L": num_levels, "M*L*P": samples, "M*L*P*2": samples * 2}
    for name, tensor in tensors.items():
        wanted = [sizes[size] for size in schema.SHAPES[name]]
        for size, wanted_size in zip(tensor.shape, wanted, strict=True):
            _require(size == wanted_size, "{} has shape {}; it should be {}", name, tensor.shape, wanted)
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
    letters = {name: letter for name, letter, _ in schema.INPUTS[op_type]}
    for name, tensor in tensors.items():
        rank, types = len(schema.SHAPES[name]), allowed[letters[name]]
        _require(tensor.dim() == rank, "{} has shape {}; it should have {} dimensions", name, tensor.shape, rank)
        wanted = " or ".join(dict.fromkeys(map(_text, types)))
        fix = f"; cast it with {name}.float()" if torch.float32 in types else ""
        _require(tensor.dtype in types, "{} is {}; it should be {}{}", name, tensor.dtype, wanted, fix)


def _empty_output(op_type: str, tensors: dict[str, Tensor], num_heads: int, num_points: int) -> Tensor:
    queries, value = next(iter(tensors.values())), tensors["value"]
    return value.new_empty(queries.shape[0], queries.shape[1], value.shape[2])


def _require(condition: bool, message: str, *values: object) -> None:
    if condition is not True:  # False, or a comparison of symbolic sizes
        torch._check_value(condition, lambda: message.format(*map(_text, values)))


def _text(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value).removeprefix("torch.")


def _run_cpu(op_type: str, tensors: dict[str, Tensor], num_heads: int, num_points: int) -> Tensor:
    core = native.load_core()
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    output = _empty_output(op_type, tensors, num_heads, num_points)
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
    core = native.load_core()
    tensors = {name: _contiguous_and_aligned(tensor) for name, tensor in tensors.items()}
    output = _empty_output(op_type, tensors, num_heads, num_points)
    arguments = _arguments(op_type, tensors, num_heads, num_points, output)
    message = ctypes.create_string_buffer(_MESSAGE_SIZE)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        status = core.kda_cuda_forward(arguments, stream, message, _MESSAGE_SIZE)
    _raise_unless_ok(status, op_type, message)
    return output


def _common_cuda_device(tensors: dict[str, Tensor]) -> torch.device:
    device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)  # one is, or this would not run
    message = "{} is on {}; it should be on {}, where the others are: {}.to('{}')"
    for name, tensor in tensors.items():
        _require(tensor.device == device, message, name, tensor.device, device, name, device)
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


for _op, _op_type in ((key_aware_deform_attn, schema.KEY_AWARE), (ms_deform_attn, schema.PLAIN)):
    _op.register_kernel("cuda")(functools.partial(_attend, _op_type, _run_cuda))
    _op.register_fake(functools.partial(_attend, _op_type, _empty_output))
    _op.register_autograd(functools.partial(_differentiate, _op_type), setup_context=_save_for_backward)
    _op.register_autocast("cpu", torch.float32)


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
