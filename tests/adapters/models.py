"""What tests of adapters share."""

import torch


def moved(made: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """The model with numbers in what trains that its start does not have."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return made
