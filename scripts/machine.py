"""Facts about the machine that a recorded result carries; `profiles.machine` holds them."""

from profiles.machine import ROOT, describe, recorded_command

__all__ = ["ROOT", "describe", "recorded_command"]
