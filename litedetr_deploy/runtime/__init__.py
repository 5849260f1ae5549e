"""Artifact -> detections: sessions, images in and out.

Needs numpy, Pillow and (when a session is made) ONNX Runtime; never torch or onnx.
"""
