"""The models of Lite DETR's tables (arXiv 2303.07335) and what they cost."""

from __future__ import annotations

from typing import NamedTuple


class PublishedModel(NamedTuple):
    variant: str
    ap: float  # on COCO val2017
    gflops: int  # 1 multiply-add = 1, one image of 850x1040
    encoder_gflops: int


PUBLISHED = (
    # 50 epochs
    PublishedModel("deformable-detr-r50", 46.8, 177, 90),
    PublishedModel("lite-deformable-detr-r50-h2l2-2+1x3", 45.8, 108, 23),
    PublishedModel("lite-deformable-detr-r50-h3l1-6+1x1", 45.9, 115, 30),
    PublishedModel("lite-deformable-detr-r50-h3l1-3+1x2", 46.2, 119, 35),
    PublishedModel("lite-deformable-detr-r50-h3l1-2+1x3", 46.7, 123, 39),
    # 36 epochs
    PublishedModel("dino-r50", 50.7, 235, 137),
    PublishedModel("lite-dino-r50-h2l2-2+1x3", 49.9, 130, 30),
    PublishedModel("lite-dino-r50-h3l1-6+1x1", 50.2, 141, 41),
    PublishedModel("lite-dino-r50-h3l1-2+1x3", 50.4, 151, 53),
    PublishedModel("h-detr-r50", 50.0, 226, 137),
    PublishedModel("lite-h-detr-r50-h3l1-2+1x3", 49.5, 142, 53),
    PublishedModel("dino-swin-t", 54.1, 243, 137),
    PublishedModel("lite-dino-swin-t-h2l2-2+1x3", 53.1, 138, 30),
    PublishedModel("lite-dino-swin-t-h3l1-6+1x1", 53.3, 149, 41),
    PublishedModel("lite-dino-swin-t-h3l1-2+1x3", 53.9, 159, 53),
    PublishedModel("h-detr-swin-t", 53.2, 234, 137),
    PublishedModel("lite-h-detr-swin-t-h2l2-2+1x3", 52.3, 131, 30),
    PublishedModel("lite-h-detr-swin-t-h3l1-6+1x1", 52.7, 142, 41),
    PublishedModel("lite-h-detr-swin-t-h3l1-2+1x3", 53.0, 152, 53),
)
