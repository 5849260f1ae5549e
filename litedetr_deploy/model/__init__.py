"""What is deployed: the detectors in PyTorch, for inference."""
