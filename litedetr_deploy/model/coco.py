"""The names of COCO's categories."""

from pathlib import Path

# Official checkpoints have 91 classes: the label is COCO's category id.  Ids that COCO does not use are "N/A".
CLASS_NAMES = tuple(Path(__file__).with_suffix(".txt").read_text().splitlines())
