"""How the attention ops are written to ONNX: as one node, or in standard operators (opset 17 and 18).

`gather` reads the four corners of every sample as rows of the value: no GridSample, which TensorRT miscompiles in
this pattern (NVIDIA/TensorRT issue 4813).  `gridsample` is the usual form.  Both compute in float whatever the
storage type is, and keep NaN and Inf of the value where bilinear sampling puts them.  A sampling location that is
infinite or NaN lies outside for `gather`, as `reference` has it; `gridsample` leaves it to the run time's GridSample.

`torch.onnx.export` traces these functions: their arguments are values of the graph, of which N, Q, S and the map
sizes may be dynamic.  What depends on constant spatial_shapes alone is folded away by the exporter.  Operators whose
inputs differ between opsets 17 and 18 (Pad, ReduceMean, Split, ...) are avoided, so that a model converts to 17.
"""

import math

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op
from onnxscript.values import Opset

from . import onnx_schema, schema

# Pixels are nearer than this, or here: one that is infinite or NaN must not make NaN of the bilinear weights.
_FAR = 2.0**20


def node(op_type: str, inputs: tuple, num_heads: int, num_points: int):
    """Write an op of `schema`, whose inputs are given in that order and None where absent, as one node."""
    onnx_schema.register()
    operator = getattr(Opset(schema.DOMAIN, schema.VERSION), op_type)
    present = [value for value in inputs if value is not None]  # only the last input is optional
    return operator(*present, num_heads=num_heads, num_points=num_points, **schema.PLUGIN_ATTRIBUTES)


def gather(op_type: str, inputs: tuple, num_heads: int, num_points: int):
    """Write an op as a gather of rows and two matrix products, [N, Q, M*D]; arguments as in `node`.

    The corners of all samples of a (query, head) are gathered into [4*L*P, D]; <query, corner> and the weighted sum
    are then matrix products, with the bilinear weights applied between them.  Of the forms measured on ONNX Runtime
    this was the fastest; its largest tensor has N*Q*M*4*L*P*D floats.
    """
    queries, value, references, offsets, spatial_shapes, key = inputs
    channels = value.shape[2]
    head_dim = channels // num_heads
    samples = spatial_shapes.shape[0] * num_points

    tokens, weights = _corners(references, offsets, spatial_shapes, value, num_heads, num_points)
    zero_token = op.Expand(_float(0.0), op.Concat(op.Shape(value, start=0, end=1), _ints(1, channels), axis=0))
    rows = op.Add(tokens, _first_rows(value, num_heads))  # [N, Q, M, 4*L*P]

    def corners_of(maps):
        """[N, S, M*D] -> [N, Q, M, 4*L*P, D].  The token behind the last one is zero: corners outside read it."""
        table = op.Concat(_as_float(maps), zero_token, axis=1)
        table = op.Transpose(op.Reshape(table, _ints(0, 0, num_heads, head_dim)), perm=[0, 2, 1, 3])
        return op.Gather(op.Reshape(table, _ints(-1, head_dim)), rows, axis=0)

    values = corners_of(value)
    if op_type == schema.KEY_AWARE:
        keys = values if key is None else corners_of(key)
        query = op.Mul(_as_float(queries), _float(1 / math.sqrt(head_dim)))
        products = op.MatMul(keys, op.Reshape(query, _ints(0, 0, num_heads, head_dim, 1)))
        products = op.Reshape(products, _ints(0, 0, num_heads, 4, samples))
        logits = op.ReduceSum(op.Mul(products, weights), _ints(3), keepdims=1)
    else:
        logits = op.Reshape(_as_float(queries), _ints(0, 0, num_heads, 1, samples))
    attention = op.Mul(op.Softmax(logits, axis=-1), weights)  # [N, Q, M, 4, L*P]
    attention = op.Reshape(attention, _ints(0, 0, num_heads, 1, 4 * samples))
    return _like(op.Reshape(op.MatMul(attention, values), _ints(0, 0, channels)), value)


def gridsample(op_type: str, inputs: tuple, num_heads: int, num_points: int):
    """Write an op with one GridSample a level; arguments and result as in `gather`."""
    queries, value, references, offsets, spatial_shapes, key = inputs
    channels = value.shape[2]
    head_dim = channels // num_heads
    num_levels = spatial_shapes.shape[0]
    samples = num_levels * num_points
    batch, num_queries = op.Shape(queries, start=0, end=1), op.Shape(queries, start=1, end=2)
    rows = op.Mul(batch, _ints(num_heads))

    def reshape(tensor, *sizes):
        """To sizes of which Q may be 0."""
        return op.Reshape(tensor, op.Concat(*sizes, axis=0), allowzero=1)

    # The grid spans -1 to 1: 2 * location - 1.
    offsets = op.Reshape(_as_float(offsets), _ints(0, 0, num_heads, num_levels, num_points, 2))
    centres = op.Unsqueeze(_part(references, 0, 2, axis=3), _ints(2, 4))  # [N, Q, 1, L, 1, 2]
    if references.shape[3] == 2:
        sizes = op.Gather(_as_float(spatial_shapes), _ints(1, 0), axis=1)  # (width, height)
        scale = op.Div(_float(2.0), op.Reshape(sizes, _ints(1, 1, 1, num_levels, 1, 2)))
    else:
        scale = op.Mul(op.Unsqueeze(_part(references, 2, 4, axis=3), _ints(2, 4)), _float(1 / num_points))
    grid = op.Add(op.Sub(op.Mul(centres, _float(2.0)), _float(1.0)), op.Mul(offsets, scale))
    grid = op.Transpose(grid, perm=[3, 0, 2, 1, 4, 5])  # [L, N, M, Q, P, 2]

    def samples_of(maps):
        """[N, S, M*D] -> [N*M, D, Q, L*P]"""
        maps = op.Transpose(_as_float(maps), perm=[0, 2, 1])
        sampled, start = [], _ints(0)
        for level in range(num_levels):
            size = op.Gather(spatial_shapes, _int(level), axis=0)  # [2]
            end = op.Add(start, op.Mul(_part(size, 0, 1, axis=0), _part(size, 1, 2, axis=0)))
            image = reshape(op.Slice(maps, start, end, _ints(2)), rows, _ints(head_dim), size)
            points = reshape(op.Gather(grid, _int(level), axis=0), rows, num_queries, _ints(num_points, 2))
            sampled.append(op.GridSample(image, points, mode="bilinear", padding_mode="zeros", align_corners=0))
            start = end
        return op.Concat(*sampled, axis=3)

    values = samples_of(value)
    if op_type == schema.KEY_AWARE:
        keys = values if key is None else samples_of(key)
        query = op.Mul(_as_float(queries), _float(1 / math.sqrt(head_dim)))
        query = op.Transpose(op.Reshape(query, _ints(0, 0, num_heads, head_dim)), perm=[0, 2, 3, 1])
        query = reshape(query, rows, _ints(head_dim), num_queries, _ints(1))
        logits = op.ReduceSum(op.Mul(keys, query), _ints(1), keepdims=1)  # [N*M, 1, Q, L*P]
    else:
        logits = op.Reshape(_as_float(queries), _ints(0, 0, num_heads, samples))
        logits = op.Transpose(logits, perm=[0, 2, 1, 3])
        logits = reshape(logits, rows, _ints(1), num_queries, _ints(samples))
    output = op.ReduceSum(op.Mul(values, op.Softmax(logits, axis=-1)), _ints(3), keepdims=0)  # [N*M, D, Q]
    output = reshape(output, batch, _ints(channels), num_queries)
    return _like(op.Transpose(output, perm=[0, 2, 1]), value)


LOWERINGS = {"op": node, "gather": gather, "gridsample": gridsample}


def _corners(references, offsets, spatial_shapes, value, num_heads: int, num_points: int):
    """The four corners of every sample: tokens, int32 [N, Q, M, 4*L*P], which are S where a corner lies outside its
    map, and bilinear weights, float [N, Q, M, 4, L*P]."""
    samples = spatial_shapes.shape[0] * num_points
    shapes = _as_float(spatial_shapes)
    heights, widths = _part(shapes, 0, 1, axis=1), _part(shapes, 1, 2, axis=1)  # [L, 1]
    offsets = op.Reshape(_as_float(offsets), _ints(0, 0, num_heads, samples, 2))

    def repeat(levels, *shape: int):
        """[..., L, 1] -> [..., L*P]"""
        return op.Reshape(op.Expand(levels, _ints(1, num_points)), _ints(*shape, samples))

    def axis_corners(axis: int, sizes):
        """For x (axis 0) or y (1): the lower and the upper corner, their weights, and whether they are inside."""
        centre = op.Mul(_part(references, axis, axis + 1, axis=3), sizes)  # [N, Q, L, 1], pixels
        pixel = repeat(op.Sub(centre, _float(0.5)), 0, 0, 1)
        offset = op.Gather(offsets, _int(axis), axis=4)  # [N, Q, M, L*P]
        if references.shape[3] == 4:
            extent = op.Mul(_part(references, axis + 2, axis + 3, axis=3), op.Mul(sizes, _float(0.5 / num_points)))
            offset = op.Mul(offset, repeat(extent, 0, 0, 1))
        pixel = op.Add(pixel, offset)
        pixel = op.Where(op.Less(op.Abs(pixel), _float(_FAR)), pixel, _float(_FAR))  # NaN is not less
        lower = op.Floor(pixel)
        upper = op.Add(lower, _float(1.0))
        upper_weight = op.Sub(pixel, lower)
        lower_weight = op.Sub(_float(1.0), upper_weight)
        limit = repeat(sizes)
        inside = [op.And(op.GreaterOrEqual(c, _float(0.0)), op.Less(c, limit)) for c in (lower, upper)]
        return zip((lower, upper), (lower_weight, upper_weight), inside, strict=True)

    # Tokens in float, exact up to 2^24 of them: one comparison and one sum fewer than in integers.
    before = op.Constant(value=ir.tensor(np.tri(spatial_shapes.shape[0], k=-1, dtype=np.float32)))
    first = repeat(op.MatMul(before, op.Mul(heights, widths)))  # first token of each level
    outside = op.Cast(op.Shape(value, start=1, end=2), to=ir.DataType.FLOAT)
    columns = list(axis_corners(0, widths))
    tokens, weights = [], []
    for row, row_weight, row_inside in axis_corners(1, heights):
        row_first = op.Add(op.Mul(row, repeat(widths)), first)
        for column, column_weight, column_inside in columns:
            tokens.append(op.Where(op.And(row_inside, column_inside), op.Add(row_first, column), outside))
            weights.append(op.Mul(row_weight, column_weight))
    tokens = op.Cast(op.Concat(*tokens, axis=-1), to=ir.DataType.INT32)
    return tokens, op.Reshape(op.Concat(*weights, axis=-1), _ints(0, 0, num_heads, 4, samples))


def _first_rows(value, num_heads: int):
    """int32 [N, 1, M, 1]: where each (batch, head) starts in a table of N*M*(S+1) rows."""
    batch = op.Range(_int(0), op.Squeeze(op.Shape(value, start=0, end=1)), _int(1))
    block = op.Mul(op.Reshape(batch, _ints(-1, 1, 1, 1)), _int(num_heads))
    block = op.Add(block, op.Reshape(_ints(*range(num_heads)), _ints(1, 1, num_heads, 1)))
    tokens = op.Add(op.Shape(value, start=1, end=2), _ints(1))
    return op.Cast(op.Mul(block, tokens), to=ir.DataType.INT32)


def _int(number: int):
    return op.Constant(value_int=number)


def _ints(*numbers: int):
    return op.Constant(value_ints=list(numbers))


def _float(number: float):
    return op.Constant(value_float=number)


def _part(tensor, start: int, end: int, axis: int):
    return op.Slice(tensor, _ints(start), _ints(end), _ints(axis))


def _as_float(tensor):
    return tensor if tensor.dtype == ir.DataType.FLOAT else op.Cast(tensor, to=ir.DataType.FLOAT)


def _like(tensor, other):
    """`tensor`, which is float, in the type of `other`."""
    return tensor if other.dtype == ir.DataType.FLOAT else op.Cast(tensor, to=other.dtype)
