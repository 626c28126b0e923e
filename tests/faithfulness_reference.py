"""AOPC, LOdds, SaCo, insertion and deletion, slowly: NumPy, one image and one cell at a time."""

import itertools
import math
from fractions import Fraction

import numpy as np
import torch


def probability(logits, target):
    """Softmax of one row, in float64."""
    logits = np.asarray(logits, dtype=np.float64)
    exponentials = np.exp(logits - logits.max())
    return exponentials[target] / exponentials.sum()


def ask(predict, image):
    """Logits of one image [C, H, W]."""
    with torch.no_grad():
        return predict(torch.from_numpy(image)[None])[0].double().numpy()


def upsampled(grid_map, height, width):
    """Bilinear between centres, edges repeated."""
    rows, columns = grid_map.shape
    drawn = np.empty((height, width), dtype=grid_map.dtype)
    for r in range(height):
        for c in range(width):
            y = max((r + 0.5) * rows / height - 0.5, 0.0)
            x = max((c + 0.5) * columns / width - 0.5, 0.0)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            v, u = y - top, x - left
            drawn[r, c] = (1 - v) * (
                (1 - u) * grid_map[top, left] + u * grid_map[top, right]
            ) + v * ((1 - u) * grid_map[bottom, left] + u * grid_map[bottom, right])
    return drawn


def cells_of(one_map, height, width, ranking, grid=None):
    """Value of each cell, and the pixels (row, column) of each."""
    if ranking == "pixel":
        if one_map.shape != (height, width):
            one_map = upsampled(one_map, height, width)
        pixels = [[(r, c)] for r in range(height) for c in range(width)]
        return [one_map[p[0]] for p in pixels], pixels
    rows, columns = grid or one_map.shape
    pixels = [[] for _ in range(rows * columns)]
    for r in range(height):
        for c in range(width):
            pixels[(r * rows // height) * columns + c * columns // width].append((r, c))
    if one_map.shape == (rows, columns):
        return list(one_map.flatten()), pixels
    return [sum(one_map[p] for p in own) for own in pixels], pixels


def most_relevant_first(values):
    """Indices of cells; Python's sort is stable."""
    return sorted(range(len(values)), key=lambda cell: -values[cell])


def default_counts(cells, steps):
    """Floor(k N / 100) for k from 10 to 90."""
    shares = [10 + Fraction(80 * i, max(steps - 1, 1)) for i in range(steps)]
    return [math.floor(k * cells / 100) for k in shares]


def filled(image, filler, pixels, cells):
    """The image with the pixels of these cells replaced, every channel."""
    copy = image.copy()
    for cell in cells:
        for r, c in pixels[cell]:
            copy[:, r, c] = filler[:, r, c]
    return copy


def saco(values, order, probabilities_of, num_groups):
    """Over groups of cells; `probabilities_of(cells)` is p with only these replaced."""
    bounds = [int(Fraction(len(order) * i, num_groups)) for i in range(num_groups + 1)]
    groups = [order[a:b] for a, b in itertools.pairwise(bounds)]
    salience = [math.fsum(values[cell] for cell in group) for group in groups]
    after = [probabilities_of(group) for group in groups]
    total = weight = 0.0
    for i in range(num_groups):
        for j in range(i + 1, num_groups):
            gap = salience[i] - salience[j]
            total += gap if after[i] <= after[j] else -gap
            weight += abs(gap)
    return total / weight


def faithfulness_of_one(p_without, p_clean, values, counts, num_groups, p_group, absolute=False):
    """The three numbers of one image; `p_without(cells)` has these cells gone."""
    order = most_relevant_first(values)
    after = [p_without(order[:count]) for count in counts]
    drops = [p_clean - p for p in after]
    return {
        "aopc": np.mean(np.abs(drops) if absolute else drops),
        "log_odds": np.mean([math.log(p) - math.log(p_clean) for p in after]),
        "saco": saco(values, order, p_group, num_groups),
    }


def area(points, fractions):
    """Trapezoids."""
    return sum(
        (fractions[i + 1] - fractions[i]) * (points[i] + points[i + 1]) / 2
        for i in range(len(points) - 1)
    )
