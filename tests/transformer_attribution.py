"""Chefer's transformer attribution, written from its formulas in NumPy for one image.

A slow reference: no batch, a loop over heads, one rule after the other, and gradients with respect
to attention by central differences of the forward pass.
"""

import math

import numpy as np

erf = np.vectorize(math.erf)


def safe(a, b):
    """A / b, and 0 where b is 0."""
    return np.divide(a, b, out=np.zeros_like(b), where=b != 0)


def norm(x, weight, bias, eps=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def softmax(x):
    raised = np.exp(x - x.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def of_linear(x, weight, relevance):
    plus, minus = np.maximum(weight, 0), np.minimum(weight, 0)
    share = safe(relevance, np.maximum(x, 0) @ plus.T + np.minimum(x, 0) @ minus.T)
    return np.maximum(x, 0) * (share @ plus) + np.minimum(x, 0) * (share @ minus)


def of_skip(x0, x1, relevance):
    share = safe(relevance, x0 + x1)
    a, b = x0 * share, x1 * share
    sizes = abs(a.sum()) + abs(b.sum())
    total = relevance.sum()
    return (
        a * (abs(a.sum()) / sizes * total / a.sum()),
        b * (abs(b.sum()) / sizes * total / b.sum()),
    )


def of_clone(x, *relevances):
    return x * sum(safe(relevance, x) for relevance in relevances)


def of_product(a, b, relevance):
    share = safe(relevance, a @ b)
    return a * (share @ b.T) / 2, b * (a.T @ share) / 2


class ReferenceVit:
    """A pre-norm ViT from the weights of a timm VisionTransformer."""

    def __init__(self, model):
        state = {key: value.double().numpy() for key, value in model.state_dict().items()}
        self.w = state
        self.heads = model.blocks[0].attn.num_heads
        self.depth = len(model.blocks)
        self.class_token = model.cls_token is not None

    def embed(self, image):
        kernel = self.w["patch_embed.proj.weight"]
        side = kernel.shape[-1]
        tokens = [
            (kernel * image[None, :, y : y + side, x : x + side]).sum((1, 2, 3))
            + self.w["patch_embed.proj.bias"]
            for y in range(0, image.shape[1], side)
            for x in range(0, image.shape[2], side)
        ]
        if self.class_token:
            tokens.insert(0, self.w["cls_token"][0, 0])
        return np.stack(tokens) + self.w["pos_embed"][0]

    def forward(self, tokens, changed=None):
        """Logits, and all that the walk back needs; `changed` replaces one block's attention."""
        w, kept, x = self.w, [], tokens
        for block in range(self.depth):
            p = f"blocks.{block}."
            k = {"x": x, "normed": norm(x, w[p + "norm1.weight"], w[p + "norm1.bias"])}
            qkv = k["normed"] @ w[p + "attn.qkv.weight"].T + w[p + "attn.qkv.bias"]
            k["q"], k["k"], k["v"] = (
                part.reshape(len(x), self.heads, -1).transpose(1, 0, 2)
                for part in np.split(qkv, 3, axis=1)
            )
            width = k["q"].shape[-1]
            k["a"] = [softmax(k["q"][h] @ k["k"][h].T / np.sqrt(width)) for h in range(self.heads)]
            if changed is not None and changed[0] == block:
                k["a"] = changed[1]
            k["mixed"] = np.concatenate([k["a"][h] @ k["v"][h] for h in range(self.heads)], axis=1)
            k["attended"] = k["mixed"] @ w[p + "attn.proj.weight"].T + w[p + "attn.proj.bias"]
            x = k["middle"] = x + k["attended"]
            k["normed2"] = norm(x, w[p + "norm2.weight"], w[p + "norm2.bias"])
            hidden = k["normed2"] @ w[p + "mlp.fc1.weight"].T + w[p + "mlp.fc1.bias"]
            k["active"] = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
            k["mlp"] = k["active"] @ w[p + "mlp.fc2.weight"].T + w[p + "mlp.fc2.bias"]
            x = x + k["mlp"]
            kept.append(k)
        final = norm(x, w["norm.weight"], w["norm.bias"])
        pooled = final[0] if self.class_token else final.mean(0)
        return pooled @ w["head.weight"].T + w["head.bias"], kept, final, pooled

    def gradient(self, tokens, block, target, step=1e-4):
        """Of the logit with respect to one block's attention, [heads, T, T]."""
        attention = np.stack(self.forward(tokens)[1][block]["a"])
        gradient = np.zeros_like(attention)
        for place in np.ndindex(*attention.shape):
            ends = []
            for sign in (1, -1):
                moved = attention.copy()
                moved[place] += sign * step
                ends.append(self.forward(tokens, (block, list(moved)))[0][target])
            gradient[place] = (ends[0] - ends[1]) / (2 * step)
        return gradient

    def relevance(self, tokens, target):
        """R_A of every block, [blocks][heads, T, T]."""
        w = self.w
        logits, kept, final, pooled = self.forward(tokens)
        one_hot = np.zeros_like(logits)
        one_hot[target] = 1
        r = of_linear(pooled, w["head.weight"], one_hot)
        if self.class_token:
            r = np.concatenate((r[None], np.zeros_like(final[1:])))
        else:
            r = final * safe(r, pooled) / len(final)
        found = []
        for block in reversed(range(self.depth)):
            p, k = f"blocks.{block}.", kept[block]
            skip, r_mlp = of_skip(k["middle"], k["mlp"], r)
            r_mlp = of_linear(k["active"], w[p + "mlp.fc2.weight"], r_mlp)
            r_mlp = of_linear(k["normed2"], w[p + "mlp.fc1.weight"], r_mlp)
            r = of_clone(k["middle"], skip, r_mlp)
            skip, r_attended = of_skip(k["x"], k["attended"], r)
            r_mixed = of_linear(k["mixed"], w[p + "attn.proj.weight"], r_attended)
            parts, r_a = [], []
            for h, r_head in enumerate(np.split(r_mixed, self.heads, axis=1)):
                of_a, of_v = of_product(k["a"][h], k["v"][h], r_head)
                of_q, of_k = of_product(k["q"][h], k["k"][h].T, of_a)
                r_a.append(of_a)
                parts.append((of_q, of_k.T, of_v))
            found.insert(0, np.stack(r_a))
            r_qkv = np.concatenate([part[i] for i in range(3) for part in parts], axis=1)
            r = of_clone(k["x"], skip, of_linear(k["normed"], w[p + "attn.qkv.weight"], r_qkv))
        return found

    def attribution(self, image, target, start_layer=0):
        """One value a patch."""
        tokens = self.embed(image)
        relevance = self.relevance(tokens, target)
        product = np.eye(len(tokens))
        for block in range(start_layer, self.depth):
            weighed = self.gradient(tokens, block, target) * relevance[block]
            product = (np.eye(len(tokens)) + np.maximum(weighed, 0).mean(0)) @ product
        product -= np.eye(len(tokens))
        return product[0, 1:] if self.class_token else product.mean(0)
