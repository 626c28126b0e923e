"""Methods for CLIP as their formulas say, one image at a time, in NumPy; gradients by differences.

A tower is seen through its parts: what enters the blocks, queries, keys and values of a block, what
its output projection and its MLP do, and how a token becomes an embedding.
"""

import math

import numpy as np
import torch
from timm.layers import apply_rot_embed_cat

STEP = 1e-5


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def layer_norm(x, norm):
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.eps)
    return scaled * numbers(norm.weight) + numbers(norm.bias)


def numbers(tensor):
    return tensor.detach().numpy()


def merged(heads):
    """[H, T, d] to [T, H * d]."""
    return np.concatenate(list(heads), axis=-1)


class OpenClipParts:
    """open_clip's VisionTransformer from its weights alone."""

    def __init__(self, tower):
        self.tower = tower
        self.blocks = list(tower.transformer.resblocks)
        self.prefix = 1
        self.read = [0] if tower.pool_type == "tok" else None

    def enter(self, image):
        kernel = numbers(self.tower.conv1.weight)
        width, _, rows, columns = kernel.shape
        height, breadth = image.shape[1] // rows, image.shape[2] // columns
        tokens = [numbers(self.tower.class_embedding)]
        for i in range(height):
            for j in range(breadth):
                part = image[:, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                tokens.append(np.array([(part * kernel[d]).sum() for d in range(width)]))
        tokens = np.stack(tokens) + numbers(self.tower.positional_embedding)
        return layer_norm(tokens, self.tower.ln_pre)

    def heads(self, block, x):
        layer = self.blocks[block].attn
        normed = layer_norm(x, self.blocks[block].ln_1)
        made = normed @ numbers(layer.in_proj_weight).T + numbers(layer.in_proj_bias)
        parts = np.split(made, 3, axis=-1)
        return [np.stack(np.split(part, layer.num_heads, axis=-1)) for part in parts]

    def out(self, block, x):
        layer = self.blocks[block].attn.out_proj
        return x @ numbers(layer.weight).T + numbers(layer.bias)

    def scale(self, block):
        return getattr(self.blocks[block].ls_1, "gamma", None)

    def mlp(self, block, x):
        block = self.blocks[block]
        first, second = block.mlp.c_fc, block.mlp.c_proj
        hidden = layer_norm(x, block.ln_2) @ numbers(first.weight).T + numbers(first.bias)
        erf = np.vectorize(math.erf)
        hidden = 0.5 * hidden * (1 + erf(hidden / math.sqrt(2)))
        made = hidden @ numbers(second.weight).T + numbers(second.bias)
        gamma = getattr(block.ls_2, "gamma", None)
        return made if gamma is None else made * numbers(gamma)

    def embed(self, x):
        """Unit embedding of one token."""
        return unit(layer_norm(x, self.tower.ln_post) @ numbers(self.tower.proj))

    def image(self, x):
        """Unit embedding of the image, from all tokens after the blocks."""
        normed = layer_norm(x, self.tower.ln_post)
        pooled = normed[0] if self.read else normed[1:].mean(axis=0)
        return unit(pooled @ numbers(self.tower.proj))


class EvaParts:
    """A timm EVA within an open_clip tower, by its single layers."""

    def __init__(self, tower):
        self.tower, self.trunk = tower, tower.trunk
        self.blocks = list(self.trunk.blocks)
        self.prefix = self.trunk.num_prefix_tokens
        self.read = [0]

    def _run(self, function, x):
        with torch.no_grad():
            return function(torch.from_numpy(x)[None])[0].numpy()

    def enter(self, image):
        with torch.no_grad():
            patches = self.trunk.patch_embed(torch.from_numpy(image)[None])
            tokens, self.rope = self.trunk._pos_embed(patches)
            return self.trunk.norm_pre(tokens)[0].numpy()

    def heads(self, block, x):
        layer = self.blocks[block].attn
        normed = layer_norm(x, self.blocks[block].norm1)
        made = []
        for part in (layer.q_proj, layer.k_proj, layer.v_proj):
            one = self._run(part, normed)
            made.append(np.stack(np.split(one, layer.num_heads, axis=-1)))
        for part in made[:2]:
            patches = torch.from_numpy(part[None, :, self.prefix :])
            part[:, self.prefix :] = apply_rot_embed_cat(patches, self.rope)[0].numpy()
        return made

    def out(self, block, x):
        layer = self.blocks[block].attn
        return self._run(layer.proj, layer_norm(x, layer.norm))

    def scale(self, block):
        return self.blocks[block].gamma_1

    def mlp(self, block, x):
        return self._run(lambda y: self.blocks[block].mlp(self.blocks[block].norm2(y)), x)

    def embed(self, x):
        with torch.no_grad():
            normed = self.trunk.norm(torch.from_numpy(x))
            return unit(self.tower.head(self.trunk.head(self.trunk.fc_norm(normed))).numpy())

    def image(self, x):
        return self.embed(x[0])


class Run:
    """One image through a tower."""

    def __init__(self, parts, image):
        self.parts = parts
        self.inputs = [parts.enter(image)]
        self.queries, self.keys, self.values = [], [], []
        for block in range(len(parts.blocks)):
            x = self.inputs[-1]
            for kept, made in zip(
                (self.queries, self.keys, self.values), parts.heads(block, x), strict=True
            ):
                kept.append(made)
            q, k, v = self.queries[-1], self.keys[-1], self.values[-1]
            attention = softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
            self.inputs.append(self.after(block, x, merged(attention @ v)))

    def attended(self, block, output):
        """What a block adds for an output of its attention."""
        made, gamma = self.parts.out(block, output), self.parts.scale(block)
        return made if gamma is None else made * numbers(gamma)

    def after(self, block, x, output):
        """Tokens after a block whose attention gave this output."""
        x = x + self.attended(block, output)
        return x + self.parts.mlp(block, x)

    def last_block(self, x):
        """Tokens after the last block, as it is, from other tokens before it."""
        block = len(self.inputs) - 2
        q, k, v = self.parts.heads(block, x)
        attention = softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        return self.after(block, x, merged(attention @ v))


def differences(function, x):
    """The gradient of a number, one entry at a time."""
    gradient = np.zeros_like(x)
    for place in np.ndindex(*x.shape):
        moved = x.copy()
        moved[place] += STEP
        up = function(moved)
        moved[place] -= 2 * STEP
        gradient[place] = (up - function(moved)) / (2 * STEP)
    return gradient


def clip_grad_cam(parts, image, text, scale):
    run = Run(parts, image)
    tokens = run.inputs[-2]
    gradient = differences(lambda x: scale * parts.image(run.last_block(x)) @ text, tokens)
    weights = sum(gradient) / len(gradient)
    return np.array([max(0, sum(weights * token)) for token in tokens[parts.prefix :]])


def eclip(parts, image, text, scale, key_similarity=True):
    run = Run(parts, image)
    block = len(parts.blocks) - 1
    q, k, v = (merged(part[-1]) for part in (run.queries, run.keys, run.values))
    output = softmax(q @ k.T / math.sqrt(q.shape[1])) @ v

    def logit(o):
        return scale * parts.image(run.after(block, run.inputs[-2], o)) @ text

    gradient = differences(logit, output)
    q, k = unit(parts.out(block, q)), unit(parts.out(block, k))
    return weighted_values(gradient, v, q, k, parts.prefix, key_similarity)


def weighted_values(gradient, v, q, k, prefix, key_similarity):
    patches = range(prefix, len(v))
    values = []
    similarity = np.ones((len(v), len(v)))
    if key_similarity:
        for r in range(len(v)):
            row = [q[r] @ k[i] for i in patches]
            for i in patches:
                similarity[r, i] = (q[r] @ k[i] - min(row)) / (max(row) - min(row))
    for i in patches:
        parts = [similarity[r, i] * sum(gradient[r] * v[i]) for r in range(len(v))]
        values.append(max(0, sum(parts)))
    return np.array(values)


def mask_clip(parts, image, text, key_similarity=True):
    run = Run(parts, image)
    block = len(parts.blocks) - 1
    tokens = run.after(block, run.inputs[-2], merged(run.values[-1]))
    keys = unit(parts.out(block, merged(run.keys[-1])))
    patches = range(parts.prefix, len(tokens))
    read = parts.read or patches
    values = []
    for i in patches:
        near = sum(keys[r] @ keys[i] for r in read) / len(read) if key_similarity else 1
        values.append(parts.embed(tokens[i]) @ text * near)
    return np.array(values)


def surgery_features(parts, image, blocks):
    """Image embedding, and the patches' by the second path."""
    run = Run(parts, image)
    depth = len(parts.blocks)
    first = max(0, depth - blocks)
    x = run.inputs[first]
    for block in range(first, depth):
        outputs = []
        for v in run.values[block]:
            outputs.append(softmax(v @ v.T / math.sqrt(v.shape[-1])) @ v)
        x = x + run.attended(block, merged(outputs))
    return parts.image(run.inputs[-1]), np.stack([parts.embed(y) for y in x[parts.prefix :]])


def less_redundant(image, patches, texts, target):
    """With a list of classes, channel by channel."""
    weights = softmax(2 * texts @ image)
    weights = weights / weights.mean()
    values = []
    for patch in patches:
        features = [patch * text * w for text, w in zip(texts, weights, strict=True)]
        mean = sum(features) / len(features)
        values.append(sum(features[target] - mean))
    return np.array(values)
