"""The models of Lite DETR's tables (arXiv 2303.07335) and what they cost; paper.json lists them by their training."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple


class PublishedModel(NamedTuple):
    variant: str  # Deformable DETR's are trained for 50 epochs, the others for 36
    ap: float  # on COCO val2017
    gflops: int  # 1 multiply-add = 1, one image of 850x1040
    encoder_gflops: int


_ROWS = csv.reader(Path(__file__).with_suffix(".csv").read_text().splitlines()[1:])
PUBLISHED = tuple(PublishedModel(variant, float(ap), *map(int, gflops)) for variant, ap, *gflops in _ROWS)
