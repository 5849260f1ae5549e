"""Anybody's ONNX model to the same with our attention op: finds deformable attention, proves it, replaces it."""
