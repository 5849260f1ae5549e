from litedetr_deploy.model.coco import CLASS_NAMES


def test_coco_names():
    assert len(CLASS_NAMES) == 91
    assert sum(name == "N/A" for name in CLASS_NAMES) == 11
    # From COCO's annotations
    for label, name in ((1, "person"), (13, "stop sign"), (18, "dog"), (44, "bottle"), (67, "dining table"),
                        (90, "toothbrush")):
        assert CLASS_NAMES[label] == name
