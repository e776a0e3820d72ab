"""The facts of a machine that a time depends on."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """Run git in the checkout; None where there is neither git nor a commit."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def highest_clock_mhz() -> int | None:
    """Return the highest clock of the first GPU's multiprocessors, as nvidia-smi knows it."""
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return int(done.stdout) if done.stdout.strip().isdigit() else None


def facts() -> dict[str, str | int | bool | None]:
    """Return the machine's facts; the results themselves do not make a checkout dirty."""
    status = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    found: dict[str, str | int | bool | None] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": git("rev-parse", "--short=12", "HEAD"),
        "dirty": None if status is None else bool(status),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": gpu.name,
            "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "clock_mhz": highest_clock_mhz(),
        }
    return found


def slug() -> str:
    """Name this machine's results after its GPU, or its processor where there is none."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
