"""Retrieval, slowly: NumPy, one query and one candidate at a time."""

import numpy as np


def found(similarities, right, k):
    """Whether a right one is among the first k; of equals, the right ones come last."""
    order = sorted(range(len(similarities)), key=lambda j: (-similarities[j], j in right))
    return any(j in right for j in order[:k])


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def text_to_image(images, texts, owners, text, k):
    return found([dot(texts[text], image) for image in images], {int(owners[text])}, k)


def image_to_text(embedding, image, texts, owners, k):
    right = {t for t in range(len(texts)) if owners[t] == image}
    return found([dot(embedding, text) for text in texts], right, k)


def recalls(images, texts, owners, ks):
    """Hits of every query, by metric."""
    images, texts = np.asarray(images, dtype=float), np.asarray(texts, dtype=float)
    hits = {}
    for k in ks:
        rows = [text_to_image(images, texts, owners, t, k) for t in range(len(texts))]
        hits[f"t2i_r@{k}"] = rows
        rows = [image_to_text(images[i], i, texts, owners, k) for i in range(len(images))]
        hits[f"i2t_r@{k}"] = rows
    return hits
