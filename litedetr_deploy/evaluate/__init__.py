"""How good an artifact's detections are."""
