"""Power, clock, temperature and throttling of the device, from NVML or from a Jetson's hwmon files."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PERIOD = 0.05  # seconds between two readings

# nvmlClocksThrottleReasons* in nvml.h: those that say that the device runs slower than it could.
THROTTLE_REASONS = {
    0x04: "power cap", 0x08: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal limit", 0x40: "hardware thermal limit", 0x80: "power brake",
}  # fmt: skip
GPU_NODES = (".gpu", ".ga10b", ".gv11b")  # how a Jetson's GPU ends in /sys/class/devfreq


class Reading(NamedTuple):
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
        texts = self._nvml.nvmlDeviceGetName(self._device), self._nvml.nvmlSystemGetDriverVersion()
        device, driver = (text.decode() if isinstance(text, bytes) else text for text in texts)
        limit = self._ask(self._nvml.nvmlDeviceGetEnforcedPowerLimit)
        return {"device": device, "driver": driver, "power_limit_watts": limit and limit / 1e3}

    def memory_used(self) -> int | None:
        """Bytes of the device's memory in use, by all processes."""
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo)
        return memory and memory.used

    def read(self) -> Reading:
        nvml = self._nvml
        reasons = self._ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
        milliwatts = self._ask(nvml.nvmlDeviceGetPowerUsage)
        return Reading(
            milliwatts and milliwatts / 1e3,
            self._ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            self._ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            frozenset(name for bit, name in THROTTLE_REASONS.items() if reasons & bit),
        )

    def _ask(self, question: Callable, *arguments):
        try:
            return question(self._device, *arguments)
        except self._nvml.NVMLError:  # not every device answers everything
            return None


class JetsonSensors:
    """Of a Jetson's module: the INA3221 power monitors that tegrastats shows, the GPU's clock, the hottest zone."""

    devices = ("cpu", "cuda")

    def __init__(self, root: Path = Path("/")):
        self.model = _text(root / "proc/device-tree/model")
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

    def describe(self) -> dict:
        description = {"device": self.model, "power_rails": list(self._rails)}
        if shutil.which("nvpmodel"):
            done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=20)
            description["power_mode"] = " ".join(done.stdout.split())
        return description

    def memory_used(self) -> None:
        """The CPU and the GPU share one memory: the resident memory of the process has it all."""

    def read(self) -> Reading:
        microwatts = sum(_number(volts) * _number(amperes) for volts, amperes in self._rails.values())
        clocks = [_number(file) / 1e6 for file in self._clocks]
        zones = [zone / 1e3 for zone in map(_number, self._zones) if zone > 0]
        events = ["over-current or over-temperature events"] * (self._count_events() > self._first_events)
        return Reading(microwatts / 1e6, max(clocks, default=None), max(zones, default=None), frozenset(events))

    def _count_events(self) -> float:
        return sum(map(_number, self._events))


def _text(file: Path) -> str:
    try:
        return file.read_text().strip(" \0\n")
    except OSError:  # a zone that is switched off, or no such file
        return ""


def _number(file: Path) -> float:
    text = _text(file)
    return float(text) if text.lstrip("-").isdigit() else 0.0


def find_sensors() -> NvmlSensors | JetsonSensors | None:
    """The device's sensors, None where there are none that can be read."""
    with contextlib.suppress(OSError):
        return JetsonSensors()
    with contextlib.suppress(Exception):  # ImportError without nvidia-ml-py, or NVML's own, of no driver
        return NvmlSensors()
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
    columns = zip(*(readings[len(readings) // 4 :] or [sensors.read()]))
    watts, clocks, temperatures, throttling = ([value for value in column if value is not None] for column in columns)
    mean_watts = sum(watts) / len(watts) if watts else None
    return {
        "watts": mean_watts,
        "joules_per_image": mean_watts * seconds / images if watts and images else None,
        "clock_mhz": sum(clocks) / len(clocks) if clocks else None,
        "lowest_clock_mhz": min(clocks, default=None),
        "temperature_c": max(temperatures, default=None),
        "throttling": sorted(set().union(*throttling)),
    }
