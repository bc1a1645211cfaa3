"""Peak memory of this process (Linux)."""

from pathlib import Path


def peak_memory() -> int:
    """Peak resident memory of this process since `reset_peak_memory`, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak_memory() -> int:
    """Make `peak_memory` count from the current memory of this process, and return that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_memory()
