"""Power, clock, temperature and throttling of the device, from NVML or from a Jetson's hwmon files.

Both are read by a thread while the device works; where neither is there, nothing is measured.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PERIOD = 0.05  # seconds between two readings

# nvmlClocksThrottleReasons* in nvml.h: those that say that the device runs slower than it could.
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal limit",
    0x40: "hardware thermal limit",
    0x80: "power brake",
}


GPU_NODES = (".gpu", ".ga10b", ".gv11b")  # how a Jetson's GPU ends in /sys/class/devfreq


@dataclass(frozen=True)
class Reading:
    watts: float | None
    clock_mhz: float | None
    temperature_c: float | None
    throttling: frozenset[str]


class NvmlSensors:
    """Of the first NVIDIA GPU, through NVIDIA's management library (package nvidia-ml-py)."""

    devices = ("cuda",)

    def __init__(self):
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._device = pynvml.nvmlDeviceGetHandleByIndex(0)

    def describe(self) -> dict:
        def text(value):
            return value.decode() if isinstance(value, bytes) else value

        return {
            "device": text(self._nvml.nvmlDeviceGetName(self._device)),
            "driver": text(self._nvml.nvmlSystemGetDriverVersion()),
            "power_limit_watts": self._ask(lambda: self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._device) / 1e3),
        }

    def memory_used(self) -> int | None:
        """Bytes of the device's memory in use, by all processes."""
        return self._ask(lambda: self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)

    def read(self) -> Reading:
        nvml, device = self._nvml, self._device
        reasons = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(device)) or 0
        return Reading(
            self._ask(lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3),
            self._ask(lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM)),
            self._ask(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
            frozenset(name for bit, name in THROTTLE_REASONS.items() if reasons & bit),
        )

    def _ask(self, question: Callable):
        try:
            return question()
        except self._nvml.NVMLError:  # not every device answers everything
            return None


class JetsonSensors:
    """Of a Jetson's module: the INA3221 power monitors that tegrastats shows, the GPU's clock, the hottest zone.

    root: of the file system; for tests.
    """

    devices = ("cpu", "cuda")

    def __init__(self, root: Path = Path("/")):
        self._root = root
        self._rails = {}  # label -> (millivolts, milliamperes)
        for label in sorted(root.glob("sys/class/hwmon/hwmon*/in*_label")):
            name, number = _text(label), label.name[2 : -len("_label")]
            files = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
            if all(file.is_file() for file in files):
                self._rails[name] = files
        if "VDD_IN" in self._rails:  # the whole module; the others are parts of it
            self._rails = {"VDD_IN": self._rails["VDD_IN"]}
        if not self._rails or not self.model:
            raise OSError("no Jetson power monitor")
        self._zones = list(root.glob("sys/class/thermal/thermal_zone*/temp"))
        clocks = root.glob("sys/class/devfreq/*/cur_freq")
        self._clocks = [file for file in clocks if file.parent.name.endswith(GPU_NODES)]
        self._events = list(root.glob("sys/class/hwmon/hwmon*/oc*_event_cnt"))
        self._first_events = self._count_events()

    @property
    def model(self) -> str:
        file = self._root / "proc/device-tree/model"
        return file.read_text().strip("\0\n") if file.is_file() else ""

    def describe(self) -> dict:
        description = {"device": self.model, "power_rails": list(self._rails)}
        if shutil.which("nvpmodel"):
            done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20)
            description["power_mode"] = " ".join(done.stdout.split())
        return description

    def memory_used(self) -> None:
        """The CPU and the GPU share one memory: the resident memory of the process has it all."""
        return None

    def read(self) -> Reading:
        microwatts = [_number(volts) * _number(amperes) for volts, amperes in self._rails.values()]
        clocks = [_number(file) / 1e6 for file in self._clocks]
        zones = [zone for zone in map(_number, self._zones) if zone > 0]
        throttled = self._count_events() > self._first_events
        return Reading(
            sum(microwatts) / 1e6,
            max(clocks, default=None),
            max(zones) / 1e3 if zones else None,
            frozenset(["over-current or over-temperature events"] if throttled else []),
        )

    def _count_events(self) -> float:
        return sum(map(_number, self._events))


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # a zone that is switched off
        return ""


def _number(file: Path) -> float:
    text = _text(file)
    return float(text) if text.lstrip("-").isdigit() else 0.0


def find_sensors() -> NvmlSensors | JetsonSensors | None:
    """The device's sensors, None where there are none that can be read."""
    try:
        return JetsonSensors()
    except OSError:
        pass
    try:
        return NvmlSensors()
    except Exception:  # ImportError without nvidia-ml-py; else NVML's own errors, of a machine without a driver
        return None


def watch(sensors, work: Callable[[], tuple[int, float]]) -> dict:
    """Runs `work`, which returns how many images it processed in how many seconds, and reads the sensors meanwhile.

    Returns watts, joules_per_image, clock_mhz (mean and lowest), temperature_c (highest), throttling (reasons).
    """
    readings, done = [], threading.Event()

    def read_on():
        while not done.wait(PERIOD):
            readings.append(sensors.read())

    thread = threading.Thread(target=read_on, daemon=True)
    thread.start()
    try:
        images, seconds = work()
    finally:
        done.set()
        thread.join()
    # The device needs a moment to reach its power.
    readings = readings[len(readings) // 4 :] or [sensors.read()]

    def known(name):
        return [value for value in (getattr(reading, name) for reading in readings) if value is not None]

    watts, clocks, temperatures = (known(name) for name in ("watts", "clock_mhz", "temperature_c"))
    mean_watts = sum(watts) / len(watts) if watts else None
    return {
        "watts": mean_watts,
        "joules_per_image": mean_watts * seconds / images if watts and images else None,
        "clock_mhz": sum(clocks) / len(clocks) if clocks else None,
        "lowest_clock_mhz": min(clocks, default=None),
        "temperature_c": max(temperatures, default=None),
        "throttling": sorted(set().union(*(reading.throttling for reading in readings))),
    }
