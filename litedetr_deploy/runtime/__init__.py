"""Artifact -> detections: sessions, images in and out.  Never imports torch; ONNX Runtime with the first session."""
