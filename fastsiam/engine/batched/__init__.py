"""The backend "batched": tensor operations on packed tokens, on any device."""

from fastsiam.engine.batched.layer import BATCHED

__all__ = ["BATCHED"]
