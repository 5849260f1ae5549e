"""What a server needs to run an artifact: folders for Triton and DeepStream, jobs on a Ray cluster."""
