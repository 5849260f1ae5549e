"""One verdict: what differs, by how much, against what yardstick, and whether an artifact passed.

`verdict` holds the verdict, the others what is compared with what: `onnx` a model with PyTorch, `engine` an engine with
its model.
"""
