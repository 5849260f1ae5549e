"""Serve a detector with Ray Serve, which runs requests that come together as one batch, and a page to try it.

python examples/ray_serve.py shapes.onnx        # then drop an image on http://127.0.0.1:8000
curl --data-binary @photo.jpg http://127.0.0.1:8000/detect
"""

import argparse
import asyncio
import os
import socket
import sys
import threading
from pathlib import Path

import litedetr_deploy as ld
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.runtime.draw import class_colour
from litedetr_deploy.runtime.images import load_image
from litedetr_deploy.serve.ray import connected

PAGE = Path(__file__).with_name("ray_serve.html")
MOST_BYTES = 32 << 20  # of an image


def application(model, batch_size=8, wait=0.01, replicas=1, gpus=0, threads=1):
    """Return the Ray Serve application: GET / is the page, POST /detect takes an image file and gives JSON.

    batch_size: requests that run together at most; wait: seconds that the first of them waits for others.
    """
    from ray import serve
    from starlette.responses import HTMLResponse, JSONResponse

    @serve.deployment(num_replicas=replicas, ray_actor_options={"num_cpus": threads, "num_gpus": gpus})
    class Detect:
        def __init__(self):
            self.detector = ld.Detector(model, threads=threads)
            self.page = PAGE.read_text("utf-8")

        @serve.batch(max_batch_size=batch_size, batch_wait_timeout_s=wait)
        async def detect(self, images):
            # In a thread, so that requests are taken while a batch runs.
            found = await asyncio.to_thread(self.detector.predict, images, 0.3, batch_size)
            return [(one, len(images)) for one in found]

        async def __call__(self, request):
            if request.url.path == "/" and request.method == "GET":
                return HTMLResponse(self.page)
            if request.url.path != "/detect" or request.method != "POST":
                return JSONResponse({"error": "POST an image to /detect, or GET /."}, 404)
            body = await request.body()
            if len(body) > MOST_BYTES:
                return JSONResponse({"error": f"The image has more than {MOST_BYTES >> 20} MiB."}, 413)
            try:
                image = await asyncio.to_thread(load_image, body)
            except LiteDetrError as error:
                return JSONResponse({"error": str(error)}, 400)
            found, together = await self.detect(image)
            names = found.names or [f"class {label}" for label in found.labels]
            rows = zip(found.labels.tolist(), names, found.scores.tolist(), found.boxes.tolist())
            detections = [
                {"label": label, "name": name, "score": score, "box": box, "colour": class_colour(label)}
                for label, name, score, box in rows
            ]
            size = {"width": image.width, "height": image.height}
            return JSONResponse({**size, "batch": together, "detections": detections})

    return Detect.bind()


def check_port(host, port):
    """Raise LiteDetrError where another program has the port: Ray's proxy would share it or retry for ever."""
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            fix = "End the program that uses it, or choose another with --port."
            raise LiteDetrError(f"The port {port} of {host} cannot be used: {error.strerror}. {fix}") from error


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="ONNX model or engine (.plan)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=8, help="requests that run together at most")
    parser.add_argument("--wait", type=float, default=0.01, help="seconds that a request waits for others")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--gpus", type=float, default=0, help="of a replica")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a replica")
    options = parser.parse_args()
    try:
        check_port(options.host, options.port)
        ld.Detector(options.model)  # what is wrong with it is said before Ray starts
        with connected():  # to RAY_ADDRESS, a cluster that runs here, or a new one
            run(options)
    except LiteDetrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        pass


def run(options):
    from ray import serve

    model = os.path.abspath(options.model)
    serve.start(http_options={"host": options.host, "port": options.port})
    try:
        serve.run(application(model, options.batch_size, options.wait, options.replicas, options.gpus, options.threads))
        print(f"Drop an image on http://{options.host}:{options.port}; Ctrl-C ends it.", flush=True)
        threading.Event().wait()
    finally:  # on a cluster that runs on, the application would stay
        serve.shutdown()


if __name__ == "__main__":
    main()
