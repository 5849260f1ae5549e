"""What a server needs to run an artifact: folders for Triton."""
