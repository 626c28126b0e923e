"""B-cosified towers once more, window by window, with what made them dynamic written down."""

import numpy as np
import torch
from torch.nn import functional

EPS = 1e-6


def slow_convolution(x, w, stride, padding, b, factor):
    """B-cos convolution of one image [C, H, W] with loops, in NumPy."""
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    size = w.shape[-1]
    rows = (x.shape[1] - size) // stride + 1
    columns = (x.shape[2] - size) // stride + 1
    out = np.zeros((len(w), rows, columns))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            window = x[:, top : top + size, left : left + size].ravel()
            for k in range(len(w)):
                out[k, i, j] = slow_unit(window, w[k].ravel(), b, factor)
    return out


def slow_unit(x, w, b, factor):
    """One output: (w . x) times what is raised to B - 1."""
    response = sum(float(p) * float(q) for p, q in zip(x, w, strict=True))
    length = max(sum(float(p) ** 2 for p in x) ** 0.5, EPS)
    if factor == "cosine":
        length *= max(sum(float(p) ** 2 for p in w) ** 0.5, EPS)
    gain = abs(response) / length
    return response * (max(gain, EPS) if b != 2 else gain) ** (b - 1)


class SlowTower:
    """The tower from the original's weights; the second run is linear, with the first one's gains.

    Args:
        tower: The original.
        b: B.
    """

    def __init__(self, tower, b):
        self.tower, self.b = tower, b
        self.written = None
        self.notes = []

    def run(self, encoded):
        """Embedding [B, E] of images in six channels."""
        self.written, self.notes = None, []
        return self.pooled(self.features(encoded))

    def again(self, other):
        """The linear map of the last `run`, applied to other channels."""
        self.written = list(self.notes)
        return self.pooled(self.features(other))

    def gains(self, make):
        """What makes a layer dynamic: computed, or as it was written down."""
        if self.written is not None:
            return self.written.pop(0)
        self.notes.append(make())
        return self.notes[-1]

    def convolution(self, x, w, stride=1, padding=0):
        size = w.shape[-1]
        rows = (x.shape[2] + 2 * padding - size) // stride + 1
        windows = functional.unfold(x, size, padding=padding, stride=stride)
        response = torch.einsum("kf,bfn->bkn", w.flatten(1), windows)

        def cosines():
            lengths = (
                windows.norm(dim=1).clamp(min=EPS)[:, None] * w.flatten(1).norm(dim=1)[:, None]
            )
            return (response.abs() / lengths).clamp(min=EPS) ** (self.b - 1)

        return (response * self.gains(cosines)).unflatten(2, (rows, -1))

    def norm(self, x, layer):
        gain = layer.weight / (layer.running_var + layer.eps).sqrt()
        return x * gain[:, None, None]

    def relu(self, x):
        return x * self.gains(lambda: (x > 0).to(x.dtype))

    def block(self, x, block):
        out = self.relu(self.norm(self.convolution(x, block.conv1.weight), block.bn1))
        out = self.relu(self.norm(self.convolution(out, block.conv2.weight, padding=1), block.bn2))
        if block.stride > 1:
            out = functional.avg_pool2d(out, block.stride)
        out = self.norm(self.convolution(out, block.conv3.weight), block.bn3)
        if block.downsample is not None:
            x = functional.avg_pool2d(x, block.stride)
            x = self.norm(self.convolution(x, block.downsample[1].weight), block.downsample[2])
        return self.relu(out + x)

    def features(self, encoded):
        tower = self.tower
        first = torch.cat((tower.conv1.weight, -tower.conv1.weight), dim=1) / 2
        x = self.relu(self.norm(self.convolution(encoded, first, 2, 1), tower.bn1))
        x = self.relu(self.norm(self.convolution(x, tower.conv2.weight, 1, 1), tower.bn2))
        x = self.relu(self.norm(self.convolution(x, tower.conv3.weight, 1, 1), tower.bn3))
        x = functional.avg_pool2d(x, 2)
        for level in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            for block in level:
                x = self.block(x, block)
        return x

    def pooled(self, features):
        pool = self.tower.attnpool
        places = features.flatten(2).transpose(1, 2)
        tokens = torch.cat((places.mean(dim=1, keepdim=True), places), dim=1)
        heads = pool.num_heads
        width = tokens.shape[-1] // heads
        rows = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)

            def attention(part=part):
                query = tokens[:, 0] @ pool.q_proj.weight[part].T
                key = tokens @ pool.k_proj.weight[part].T
                return (torch.einsum("bd,bnd->bn", query, key) / width**0.5).softmax(dim=1)

            value = tokens @ pool.v_proj.weight[part].T
            rows.append(torch.einsum("bn,bnd->bd", self.gains(attention), value))
        return torch.cat(rows, dim=1) @ pool.c_proj.weight.T

    def places(self, encoded):
        """Embeddings of places [B, N, E], each through the value and the output projection."""
        self.written, self.notes = None, []
        features = self.features(encoded)
        pool = self.tower.attnpool
        found = []
        for image in features:
            rows = []
            for place in image.flatten(1).T:
                value = (pool.v_proj.weight @ place).detach().numpy()
                weight = pool.c_proj.weight.detach().numpy()
                rows.append([slow_unit(value, w, self.b, "cosine") for w in weight])
            found.append(rows)
        return torch.tensor(found, dtype=features.dtype)
