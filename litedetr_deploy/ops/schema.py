"""The two attention ops, written down once: domain, types, version, inputs, attributes.

Everything in Python that names an op, an input or an attribute reads it here; the C++ side has the same in
`plugins/onnxruntime` and `plugins/tensorrt`.
"""

DOMAIN = "litedetr"
VERSION = 1

KEY_AWARE = "KeyAwareDeformAttn"
PLAIN = "MSDeformAttn"

# (name, type letter, optional).  T: float, float16 or bfloat16 storage; F: float; U: T or float; I: int64.
INPUTS = {
    KEY_AWARE: (
        ("query", "T", False),  # [N, Q, M*D], after the query projection
        ("value", "T", False),  # [N, S, M*D], after the value projection, padding zeroed
        ("reference_points", "F", False),  # [N, Q, L, 2 or 4]
        ("sampling_offsets", "U", False),  # [N, Q, M*L*P*2], the raw output of the offset Linear
        ("spatial_shapes", "I", False),  # [L, 2], (height, width), fine to coarse
        ("key", "T", True),  # [N, S, M*D]; absent: the key is the value
    ),
    PLAIN: (
        ("attention_logits", "T", False),  # [N, Q, M*L*P], before the softmax
        ("value", "T", False),
        ("reference_points", "F", False),
        ("sampling_offsets", "U", False),
        ("spatial_shapes", "I", False),
    ),
}
OUTPUT = "output"  # [N, Q, M*D], type T
ATTRIBUTES = ("num_heads", "num_points")  # int
# TensorRT's parser finds a plugin by op type and these two string attributes.
PLUGIN_ATTRIBUTES = {"plugin_version": str(VERSION), "plugin_namespace": ""}

MAX_LEVELS = 8
MAX_POINTS = 8
