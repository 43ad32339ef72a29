"""What Triton kernels of every family share: how they are launched. Triton itself is imported with the first call."""

from parco.kernels.triton.launch import bits_of, power_of_two, run

__all__ = ["bits_of", "power_of_two", "run"]
