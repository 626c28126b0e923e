"""Random numbers of a method: the same at every call, so that an image keeps its explanation."""

import torch


class Draws:
    """One number drawn from a generator, which seeds every call of a method.

    So a method is a function of the image: neither the rest of a batch nor the calls before change
    what it draws.

    Args:
        generator: Source of that number; seed 0 if None.
    """

    def __init__(self, generator: torch.Generator | None):
        self._seed = 0
        if generator is not None:
            drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
            self._seed = int(drawn)

    def again(self) -> torch.Generator:
        """A generator on the CPU, from the start."""
        return torch.Generator().manual_seed(self._seed)
