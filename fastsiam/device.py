"""The device that is computed on, or why this machine cannot."""

from __future__ import annotations

import textwrap

import torch


class UnavailableError(RuntimeError):
    """The machine lacks what was asked for: a device, or what a backend needs."""


def pick_device(device: torch.device | str | None) -> torch.device:
    """Return the device; None means CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no device of that name.
        UnavailableError: there is, but not on this machine.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be like cpu, cuda or cuda:0, got {str(device)!r}") from error
    try:
        torch.zeros(1, device=chosen).item()  # "meta" holds no value to give back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = textwrap.shorten(str(error).split("\n", 1)[0].rstrip("."), 120, placeholder=" ...")
        raise UnavailableError(
            f"device {str(device)!r} cannot be used on this machine ({reason}); use cpu"
        ) from error
    return chosen
