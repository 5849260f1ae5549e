"""The two attention ops, written down once: domain, types, version, inputs, shapes, attributes.

Everything in Python that names an op, an input or an attribute reads it here; the C++ side has the same in
`plugins/op.h`.
"""

DOMAIN = "litedetr"
VERSION = 1

KEY_AWARE = "KeyAwareDeformAttn"
PLAIN = "MSDeformAttn"

# (name, type letter, optional).  T: float, float16 or bfloat16 storage; F: float; U: T or float; I: int64.
_SHARED = (
    ("value", "T", False),  # after the value projection, padding zeroed
    ("reference_points", "F", False),
    ("sampling_offsets", "U", False),  # the raw output of the offset Linear
    ("spatial_shapes", "I", False),  # (height, width), fine to coarse
)
INPUTS = {
    # The query is taken after its projection; without a key, the key is the value.
    KEY_AWARE: (("query", "T", False), *_SHARED, ("key", "T", True)),
    PLAIN: (("attention_logits", "T", False), *_SHARED),  # before the softmax
}
OUTPUT = "output"  # of type T
# N: batch, Q: queries, S: tokens of all levels, M: heads, D: channels of a head, L: levels, P: points of a level,
# R: 2, (x, y), or 4, (x, y, w, h).
SHAPES = {
    "query": ("N", "Q", "M*D"),
    "attention_logits": ("N", "Q", "M*L*P"),
    "value": ("N", "S", "M*D"),
    "reference_points": ("N", "Q", "L", "R"),
    "sampling_offsets": ("N", "Q", "M*L*P*2"),
    "spatial_shapes": ("L", "2"),
    "key": ("N", "S", "M*D"),
    OUTPUT: ("N", "Q", "M*D"),
}
ATTRIBUTES = ("num_heads", "num_points")  # M and P, int
# TensorRT's parser finds a plugin by op type and these two string attributes.
PLUGIN_ATTRIBUTES = {"plugin_version": str(VERSION), "plugin_namespace": ""}
