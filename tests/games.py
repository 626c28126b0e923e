"""Games whose Shapley values are known from their definition."""

import itertools
import math

import numpy as np
import torch


class TableGame:
    """A batch of games, each a table of 2^N random values a class; counts what it is asked."""

    def __init__(self, batch, num_patches, classes=None, seed=0, smooth=True, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        shape = (batch, 2**num_patches) if classes is None else (batch, 2**num_patches, classes)
        self.table = torch.randn(shape, generator=generator, dtype=torch.float64)
        if smooth:
            # Mostly additive, as real games are; purely random tables need very many coalitions.
            bits = torch.arange(2**num_patches)[:, None] >> torch.arange(num_patches) & 1
            shape = (batch, num_patches) if classes is None else (batch, num_patches, classes)
            weights = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.table = 0.1 * self.table + torch.einsum("sn,bn...->bs...", bits.double(), weights)
        self.table = self.table.to(dtype)
        self.num_patches = num_patches
        self.asked = 0

    def __call__(self, coalitions):
        self.asked += coalitions.shape[0] * coalitions.shape[1]
        rows = (coalitions.long() << torch.arange(self.num_patches)).sum(-1)
        return torch.stack([table[row] for table, row in zip(self.table, rows, strict=True)])

    def only(self, index):
        """One of the games, as a batch of one."""
        one = object.__new__(type(self))
        one.table, one.num_patches, one.asked = self.table[index : index + 1], self.num_patches, 0
        return one

    def shapley(self):
        """By the definition, with loops."""
        games = [shapley_by_definition(t.double().numpy()) for t in self.table]
        return torch.from_numpy(np.stack(games))


class NarrowingGame(TableGame):
    """A table game that can leave games out."""

    def select(self, rows):
        part = object.__new__(type(self))
        part.table, part.num_patches, part.parent = self.table[rows], self.num_patches, self
        part.asked = 0
        self.narrowed = part
        return part


def shapley_by_definition(table):
    """Sum over S without i of |S|! (N - |S| - 1)! / N! (v(S + i) - v(S)); row = bits of S."""
    players = range(int(math.log2(len(table))))
    num = len(players)
    values = np.zeros((num, *table.shape[1:]))
    for player in players:
        others = [p for p in players if p != player]
        for size in range(num):
            weight = math.factorial(size) * math.factorial(num - size - 1) / math.factorial(num)
            for chosen in itertools.combinations(others, size):
                row = sum(1 << p for p in chosen)
                values[player] += weight * (table[row | 1 << player] - table[row])
    return values
