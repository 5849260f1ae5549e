"""How fast detectors are on this machine: every way to run one, checked against PyTorch and timed side by side."""
