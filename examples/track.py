"""Number the objects of a video with ByteTrack: python track.py MODEL.onnx VIDEO OUTPUT.mp4  (supervision < 0.31)"""

import sys

import supervision as sv

import litedetr_deploy as ld

detector, tracker = ld.Detector(sys.argv[1]), sv.ByteTrack()
boxes, labels = sv.BoxAnnotator(), sv.LabelAnnotator()


def track(frame, index):
    [found] = detector.predict(frame[..., ::-1], threshold=0.3)  # frames are BGR, as OpenCV has them
    tracked = tracker.update_with_detections(found.to_supervision())
    names = [f"{number} {name}" for number, name in zip(tracked.tracker_id, tracked["class_name"])]
    return labels.annotate(boxes.annotate(frame.copy(), tracked), tracked, names)


sv.process_video(sys.argv[2], sys.argv[3], track)
