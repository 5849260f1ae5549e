"""The two attention ops in PyTorch, `torch.ops.litedetr.*`, and their translation to ONNX.

    torch.ops.litedetr.key_aware_deform_attn(query, value, reference_points, sampling_offsets, spatial_shapes,
                                             num_heads, num_points, key=None)
    torch.ops.litedetr.ms_deform_attn(attention_logits, value, reference_points, sampling_offsets, spatial_shapes,
                                      num_heads, num_points)

Shapes and types are those of `schema.INPUTS`; `reference` defines what they compute.  A tensor that does not fit is a
ValueError that names it; a native library that is missing or fails is a RuntimeError.  On CUDA all tensors are on one
device, spatial_shapes too, and nothing waits for the device, so that a call can be captured in a CUDA graph.
Both can be trained.  On the CPU in float32 the gradients are the native library's; elsewhere PyTorch differentiates
`reference`, which is right and slow.  Under CPU autocast both compute in float32.

Importing this module registers the ops; the native library is loaded by the first call.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import native, reference, schema

_DTYPES = {torch.float32: native.FLOAT32, torch.float16: native.FLOAT16, torch.bfloat16: native.BFLOAT16}
_CUDA_ALIGNMENT = 16  # bytes; kda_cuda_check in plugins/kda/cuda.cpp
_Message = ctypes.c_char * 512
_thread = threading.local()


def _attend(op_type: str, device_type: str, *arguments) -> Tensor:
    """Check the op's arguments, in their order, and run it on 'cpu' or 'cuda'; 'meta': only make the output."""
    *inputs, num_heads, num_points = arguments[:7]
    tensors = _checked(op_type, (*inputs, *arguments[7:]), num_heads, num_points)
    queries, value = inputs[:2]
    output = value.new_empty(queries.shape[0], queries.shape[1], value.shape[2])
    if device_type == "meta":
        return output
    core = native.load_core()
    prepare = Tensor.contiguous if device_type == "cpu" else _contiguous_and_aligned
    tensors = {name: prepare(tensor) for name, tensor in tensors.items()}
    structure = _arguments(op_type, tensors, num_heads, num_points, output)
    if device_type == "cpu":
        _call(op_type, core.kda_cpu_check, structure)
        workspace = _workspace(core.kda_cpu_workspace_size(structure))
        _call(op_type, core.kda_cpu_forward, structure, workspace.data_ptr(), _torch_threads())
    else:
        with torch.cuda.device(_common_cuda_device(tensors)):
            _call(op_type, core.kda_cuda_forward, structure, torch.cuda.current_stream().cuda_stream)
    return output


def _call(op_type: str, function: Callable, *arguments) -> None:
    """Call a function of the native library; raise what it says."""
    message = _Message()
    status = function(*arguments, message, len(message))
    if status != native.OK:
        error = ValueError if status == native.INVALID_ARGUMENT else RuntimeError
        raise error(f"{op_type}: {message.value.decode()}")


def _arguments(
    op_type: str, tensors: dict[str, Tensor], num_heads: int, num_points: int, output: Tensor
) -> native.Arguments:
    queries, value = next(iter(tensors.values())), tensors["value"]
    return native.Arguments(
        batch=value.shape[0], num_queries=queries.shape[1], num_tokens=value.shape[1],
        num_heads=num_heads, head_dim=value.shape[2] // num_heads,
        num_levels=tensors["spatial_shapes"].shape[0], num_points=num_points,
        reference_width=tensors["reference_points"].shape[3], key_aware=op_type == schema.KEY_AWARE,
        dtype=_DTYPES[value.dtype], offset_dtype=_DTYPES[tensors["sampling_offsets"].dtype],
        output=output.data_ptr(),
        **{name.replace("attention_logits", "query"): tensor.data_ptr() for name, tensor in tensors.items()},
    )  # fmt: skip


def _common_cuda_device(tensors: dict[str, Tensor]) -> torch.device:
    device = next(tensor.device for tensor in tensors.values() if tensor.is_cuda)  # one is, or this would not run
    message = "{} is on {}; it should be on {}, where the others are: {}.to('{}')"
    for name, tensor in tensors.items():
        _require(tensor.device == device, message, name, tensor.device, device, name, device)
    return device


def _contiguous_and_aligned(tensor: Tensor) -> Tensor:
    tensor = tensor.contiguous()  # a slice can be contiguous and start anywhere
    return tensor if tensor.data_ptr() % _CUDA_ALIGNMENT == 0 else tensor.clone()


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
    functions = native.load_core().kda_run_parallel_for, libtorch.torch_parallel_for
    return native.Executor(*(ctypes.cast(function, ctypes.c_void_p) for function in functions))


def _named(op_type: str, inputs: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """The inputs that are there, by name."""
    return {name: tensor for (name, *_), tensor in zip(schema.INPUTS[op_type], inputs) if tensor is not None}


def _checked(op_type: str, inputs: Sequence[Tensor | None], num_heads: int, num_points: int) -> dict[str, Tensor]:
    """The inputs that are there, by name, after all checks that shapes and types alone allow; sizes may be symbolic.
    What the kernels support, and the values of spatial_shapes, the native library checks."""
    if num_heads < 1 or num_points < 1:
        raise ValueError(f"num_heads is {num_heads} and num_points is {num_points}; both should be at least 1")
    tensors = _named(op_type, inputs)
    dtype = tensors["value"].dtype
    allowed = {"T": (dtype,) if dtype in _DTYPES else (*_DTYPES,), "U": (dtype, torch.float32)}
    allowed |= {"F": (torch.float32,), "I": (torch.int64,)}
    for name, letter, _ in schema.INPUTS[op_type][: len(tensors)]:
        tensor, rank, types = tensors[name], len(schema.SHAPES[name]), allowed[letter]
        _require(tensor.dim() == rank, "{} has shape {}; it should have {} dimensions", name, tensor.shape, rank)
        if tensor.dtype not in types:
            fix = f"; cast it with {name}.float()" if torch.float32 in types else ""
            wanted = " or ".join(dict.fromkeys(map(_text, types)))
            raise ValueError(f"{name} is {_text(tensor.dtype)}; it should be {wanted}{fix}")
    references, num_levels = tensors["reference_points"].shape, tensors["spatial_shapes"].shape[0]
    n, s, channels = tensors["value"].shape
    message = "value has {} channels; they should divide by the {} heads"
    _require(channels % num_heads == 0, message, channels, num_heads)
    _require(references[3] in (2, 4), "reference_points has shape {}; the last size should be 2 or 4", references)
    samples = num_heads * num_levels * num_points
    sizes = {"N": n, "Q": next(iter(tensors.values())).shape[1], "S": s, "M*D": channels, "R": references[3], "2": 2}
    sizes |= {"L": num_levels, "M*L*P": samples, "M*L*P*2": samples * 2}
    for name, tensor in tensors.items():
        wanted_shape = [sizes[size] for size in schema.SHAPES[name]]
        for size, wanted_size in zip(tensor.shape, wanted_shape, strict=True):
            _require(size == wanted_size, "{} has shape {}; it should be {}", name, tensor.shape, wanted_shape)
    return tensors


def _require(condition: bool, message: str, *values: object) -> None:
    if condition is not True:  # False, or a comparison of symbolic sizes
        torch._check_value(condition, lambda: message.format(*map(_text, values)))


def _text(value: object) -> str:
    return str(list(value) if isinstance(value, tuple) else value).removeprefix("torch.")


_BACKWARD = (
    "(Tensor output_gradient, Tensor queries, Tensor value, Tensor reference_points, Tensor sampling_offsets, "
    "Tensor spatial_shapes, Tensor? key, SymInt num_heads, SymInt num_points, bool key_aware, bool references_wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op(
    f"{schema.DOMAIN}::deform_attn_backward", mutates_args=(), device_types="cpu", schema=_BACKWARD
)
def deform_attn_backward(output_gradient: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The native backward pass of both ops, for float32 tensors: `queries` are the attention logits of the plain op.
    The gradient of reference_points is empty where it is not wanted, that of key where there is none."""
    *inputs, num_heads, num_points, key_aware, _ = arguments
    op_type = schema.KEY_AWARE if key_aware else schema.PLAIN
    tensors = {name: tensor.contiguous() for name, tensor in _named(op_type, inputs).items()}
    output_gradient = output_gradient.contiguous()
    gradients = _empty_gradients(output_gradient, *arguments)
    names = ("query", "value", "reference_points", "sampling_offsets", "key")
    addresses = {name: tensor.data_ptr() or None for name, tensor in zip(names, gradients, strict=True)}
    structure = _arguments(op_type, tensors, num_heads, num_points, output_gradient)
    out = native.Gradients(output=output_gradient.data_ptr(), **addresses)
    _call(op_type, native.load_core().kda_cpu_backward, structure, out, _torch_threads())
    return gradients


@deform_attn_backward.register_fake
def _empty_gradients(output_gradient, queries, value, references, offsets, spatial_shapes, key, *options):
    *_, references_wanted = options
    return tuple(
        value.new_empty(0) if owner is None else torch.empty_like(owner, memory_format=torch.contiguous_format)
        for owner in (queries, value, references if references_wanted else None, offsets, key)
    )


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.num_heads, ctx.num_points = inputs[:7]
    ctx.save_for_backward(*tensors, *(key for key in inputs[7:] if key is not None))


def _differentiate(op_type: str, ctx, output_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of an op's arguments, in their order; None where none is wanted or can be."""
    tensors = ctx.saved_tensors
    wanted = (*ctx.needs_input_grad[:5], *ctx.needs_input_grad[7:])[: len(tensors)]
    if tensors[1].device.type == "cpu" and tensors[1].dtype == torch.float32:
        key = tensors[5] if len(tensors) > 5 else None
        options = (ctx.num_heads, ctx.num_points, op_type == schema.KEY_AWARE, wanted[2])
        *others, of_key = deform_attn_backward(output_gradient, *tensors[:5], key, *options)
        found = [*others, None, of_key]
    else:
        attend: Callable = reference.key_aware_deform_attn if op_type == schema.KEY_AWARE else reference.ms_deform_attn
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_(want) for tensor, want in zip(tensors, wanted, strict=True)]
            output = attend(*leaves[:5], ctx.num_heads, ctx.num_points, *leaves[5:])
        gradients = iter(torch.autograd.grad(output, [leaf for leaf in leaves if leaf.requires_grad], output_gradient))
        found = [next(gradients) if want else None for want in wanted]
    found = [gradient if want else None for gradient, want in zip(found, wanted)]
    return (*found[:5], None, None, *(found[5:] or [None]))


def _define(op_type: str, function: str) -> torch.library.CustomOpDef:
    inputs = [f"Tensor? {name}=None" if optional else f"Tensor {name}" for name, _, optional in schema.INPUTS[op_type]]
    parameters = ", ".join([*inputs[:5], *(f"SymInt {name}" for name in schema.ATTRIBUTES), *inputs[5:]])
    op = torch.library.custom_op(
        f"{schema.DOMAIN}::{function}", functools.partial(_attend, op_type, "cpu"),
        mutates_args=(), device_types="cpu", schema=f"({parameters}) -> Tensor",
    )  # fmt: skip
    op.register_kernel("cuda")(functools.partial(_attend, op_type, "cuda"))
    op.register_fake(functools.partial(_attend, op_type, "meta"))
    op.register_autograd(functools.partial(_differentiate, op_type), setup_context=_save_for_backward)
    op.register_autocast("cpu", torch.float32)
    return op


key_aware_deform_attn = _define(schema.KEY_AWARE, "key_aware_deform_attn")
ms_deform_attn = _define(schema.PLAIN, "ms_deform_attn")


def onnx_translations(attention: str) -> dict[Callable, Callable]:
    """The `custom_translation_table` with which `torch.onnx.export(dynamo=True)` writes both ops: for attention 'op'
    as one node of the domain `litedetr`, for 'gather' and 'gridsample' in standard ONNX ops; else ValueError."""
    from .lowering import LOWERINGS

    if attention not in LOWERINGS:
        raise ValueError(f"attention is {attention!r}; it should be one of {', '.join(map(repr, LOWERINGS))}")
    write = LOWERINGS[attention]

    # The exporter reads the parameters of these two to match them with the op's.
    def write_key_aware(
        query, value, reference_points, sampling_offsets, spatial_shapes, num_heads: int, num_points: int, key=None
    ):
        inputs = (query, value, reference_points, sampling_offsets, spatial_shapes, key)
        return write(schema.KEY_AWARE, inputs, num_heads, num_points)

    def write_plain(
        attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads: int, num_points: int
    ):
        inputs = (attention_logits, value, reference_points, sampling_offsets, spatial_shapes, None)
        return write(schema.PLAIN, inputs, num_heads, num_points)

    ops = torch.ops.litedetr
    return {ops.key_aware_deform_attn.default: write_key_aware, ops.ms_deform_attn.default: write_plain}
