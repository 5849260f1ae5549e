"""NVIDIA's Triton server as nvidia-pytriton brings it, for tests and for benchmarks/triton.py."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PORTS = "http", "grpc", "metrics"
# nvidia-pytriton and the NumPy 1 that its Python back end takes, apart from this environment's.
PACKAGES = Path(sys.prefix) / "triton"
PYTHON_PATH = os.pathsep.join([str(PACKAGES), sysconfig.get_path("purelib")])


@dataclass
class Server:
    process: subprocess.Popen
    ports: dict[str, int]
    log: Path

    @property
    def http(self) -> str:
        return f"127.0.0.1:{self.ports['http']}"

    @property
    def grpc(self) -> str:
        return f"127.0.0.1:{self.ports['grpc']}"

    def memory(self) -> int:
        """Return the resident bytes of the server and of its models' processes, shared pages once for each."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in (self.process.pid, *children)]
        lines = [line for status in statuses for line in status.splitlines() if line.startswith("VmRSS:")]
        return sum(int(line.split()[1]) * 1024 for line in lines)


def installed() -> bool:
    """Return whether `make` has installed nvidia-pytriton."""
    return (PACKAGES / "pytriton").is_dir()


def free_ports() -> dict[str, int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in PORTS]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return {name: one.getsockname()[1] for name, one in zip(PORTS, sockets)}


def start(
    repository: Path, folder: Path, *options: str, ports: dict[str, int] | None = None, python_path: str = PYTHON_PATH
) -> Server:
    """Start `repository`/start.sh on the loopback; `folder` takes the server's log and its back ends."""
    triton, backends = PACKAGES / "pytriton" / "tritonserver", folder / "backends"
    shutil.copytree(triton / "backends", backends)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(triton / "python_backend_stubs" / python / "triton_python_backend_stub", backends / "python")
    environment = os.environ | {
        "TRITONSERVER": str(triton / "bin" / "tritonserver"),
        "LD_LIBRARY_PATH": str(PACKAGES / "nvidia_pytriton.libs"),
        "PYTHONPATH": python_path,
    }
    ports = ports or free_ports()
    words = [f"--backend-directory={backends}", *options]
    for name in PORTS:
        words += [f"--{name}-address=127.0.0.1", f"--{name}-port={ports[name]}"]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            ["sh", str(repository / "start.sh"), *words], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    return Server(process, ports, log)


@contextlib.contextmanager
def serving(repository: Path, folder: Path, *options: str) -> Iterator[Server]:
    """Give a server that has loaded all models of `repository`; it ends with the block."""
    import tritonclient.http

    server = start(repository, folder, *options)
    try:
        with contextlib.closing(tritonclient.http.InferenceServerClient(server.http)) as client:
            for _ in range(600):
                if server.process.poll() is not None:
                    raise RuntimeError(f"the server has ended:\n{server.log.read_text()[-4000:]}")
                with contextlib.suppress(Exception):  # it is not there yet
                    if client.is_server_ready():
                        break
                time.sleep(0.2)
            else:
                raise RuntimeError(f"the server does not become ready:\n{server.log.read_text()[-4000:]}")
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
