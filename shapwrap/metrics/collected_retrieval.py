"""Retrieval over a data set, as torchmetrics collects it over batches and processes."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError, MissingDependencyError
from shapwrap.explainers.explained_model import Model
from shapwrap.explanation import Explanation
from shapwrap.metrics.candidates import Candidates, checked_ks
from shapwrap.metrics.protocol import Protocol
from shapwrap.metrics.retrieval_curves import retrieval_insertion_deletion
from shapwrap.metrics.retrieval_recall import RetrievalScores, retrieval

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise MissingDependencyError(
        "metrics that collect over batches need torchmetrics; install it with "
        "pip install 'shapwrap[metrics]', or call the functions, which do not need it."
    ) from error

UNNAMED = -1
"""Of an image that came without an id, so that it is no repetition."""

_CURVE_OPTIONS = ("fill", "insertion_fill", "steps", "fractions", "ranking", "grid", "generator")


class Retrieval(Metric):
    """Recall at k over all images and texts that any process has seen; see `retrieval`.

    `compute` returns a dictionary of scalars: `t2i_r@<k>`, `i2t_r@<k>`, `num_images` and
    `num_texts`. States are features, since every text is compared with every image; torchmetrics
    gathers them in `compute`. Every process needs at least one batch.

    Args:
        ks: Which k.
        chunk_size: Queries compared with all candidates at a time.
        options: Of torchmetrics.Metric.

    Raises:
        ArgumentError: An option outside its range.
        MissingDependencyError: On import, if torchmetrics is not installed.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update: bool | None = False

    image_features: list[Tensor]
    text_features: list[Tensor]
    image_of_text: list[Tensor]
    image_ids: list[Tensor]
    batch_images: list[Tensor]
    batch_texts: list[Tensor]

    def __init__(self, *, ks: Sequence[int] = (1, 5), chunk_size: int = 1024, **options: Any):
        super().__init__(**options)
        check_at_least("chunk_size", chunk_size, 1)
        self.ks = checked_ks(ks)
        self.chunk_size = chunk_size
        self.protocol: Protocol | None = None
        """Of the last `compute`."""
        states = ("image_features", "text_features", "image_of_text", "image_ids")
        for name in (*states, "batch_images", "batch_texts"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_of_text: Tensor | Sequence[int],
        image_ids: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Add images with all their texts.

        Args:
            image_features: Float [B, E].
            text_features: Float [C, E].
            image_of_text: Index in this batch of the image of each text, int [C].
            image_ids: One number an image, at least 0, the same wherever the image comes again: it
                counts once, as samplers repeat images to give all processes as many. Without ids,
                all images are new.

        Raises:
            ArgumentError: Features that do not fit each other or those before, or are not finite,
                an image without a text, or ids that are not one an image.
        """
        found = Candidates.checked(image_features, text_features, image_of_text)
        if self.image_features and self.image_features[0].shape[1] != found.images.shape[1]:
            raise ArgumentError(
                f"features have {self.image_features[0].shape[1]} dimensions before, and "
                f"{found.images.shape[1]} now; expected embeddings of one model. Call reset first."
            )
        num, device = len(found.images), found.images.device
        if image_ids is None:
            ids = torch.full((num,), UNNAMED, device=device)
        else:
            ids = torch.as_tensor(image_ids, device=device)
            if ids.shape != (num,) or ids.dtype != torch.int64 or bool((ids < 0).any()):
                raise ArgumentError(
                    f"image_ids are {ids.dtype} of shape {tuple(ids.shape)}; expected int64 "
                    f"[{num}], at least 0 each."
                )
        self.image_features.append(found.images)
        self.text_features.append(found.texts)
        self.image_of_text.append(found.image_of_text)
        self.image_ids.append(ids)
        self.batch_images.append(torch.tensor([num], device=device))
        self.batch_texts.append(torch.tensor([len(found.texts)], device=device))

    def compute(self) -> dict[str, Tensor]:
        """Recalls over everything that was added.

        Raises:
            ArgumentError: Nothing was added.
        """
        scores = self.scores()
        self.protocol = scores.protocol
        sizes = {"num_images": len(scores.places["i2t"]), "num_texts": len(scores.places["t2i"])}
        means = {name: torch.tensor(mean) for name, mean in scores.mean().items()}
        return means | {name: torch.tensor(size) for name, size in sizes.items()}

    def scores(self) -> RetrievalScores:
        """One number a query, of what this process holds; `compute` gathers first.

        Raises:
            ArgumentError: Nothing was added.
        """
        if not len(self.image_features):
            raise ArgumentError("no image was added; call update first.")
        per_batch = dim_zero_cat(self.batch_images)
        # Batches keep their order when they are gathered, whichever process they come from.
        offsets = per_batch.cumsum(dim=0) - per_batch
        offset = offsets.repeat_interleave(dim_zero_cat(self.batch_texts))
        owners = dim_zero_cat(self.image_of_text) + offset
        kept = _first_of_each(dim_zero_cat(self.image_ids))
        place = kept.cumsum(dim=0) - 1
        texts = kept[owners]
        return retrieval(
            dim_zero_cat(self.image_features)[kept],
            dim_zero_cat(self.text_features)[texts],
            place[owners[texts]],
            ks=self.ks,
            chunk_size=self.chunk_size,
        )


class RetrievalInsertionDeletion(Metric):
    """Means of `retrieval_insertion_deletion` over pairs that come in batches.

    `compute` returns a dictionary of scalars: the mean areas, and `num_pairs`. States are sums, so
    memory does not grow with the pairs; gallery and texts are those of the whole data set.

    Args:
        encode_image: Images in [0, 1] to embeddings.
        gallery: Embeddings of all clean images, float [I, E].
        text_features: Float [T, E].
        image_of_text: Index in the gallery of the image of each text.
        ks: Which k.
        chunk_size: Perturbed images that are encoded at a time.
        kwargs: Other options of the function, and of torchmetrics.Metric.

    Raises:
        ArgumentError: Features that do not fit, or bad ks.
        MissingDependencyError: On import, if torchmetrics is not installed.
    """

    is_differentiable = False
    full_state_update: bool | None = False
    areas: Tensor
    num_pairs: Tensor

    def __init__(
        self,
        encode_image: Model,
        gallery: Tensor,
        text_features: Tensor,
        image_of_text: Tensor | Sequence[int],
        *,
        ks: Sequence[int] = (1, 5),
        chunk_size: int = 64,
        **kwargs: Any,
    ):
        options = {name: kwargs.pop(name) for name in _CURVE_OPTIONS if name in kwargs}
        super().__init__(**kwargs)
        found = Candidates.checked(gallery, text_features, image_of_text)
        # Inside the partial, so that a module does not become a part of this one.
        self._measure = partial(
            retrieval_insertion_deletion,
            encode_image,
            text_features=found.texts,
            image_of_text=found.image_of_text,
            gallery=found.images,
            ks=ks,
            chunk_size=chunk_size,
            **options,
        )
        self.names = [
            f"{curve}_{way}_r@{k}"
            for curve in ("insertion", "deletion")
            for way in ("t2i", "i2t")
            for k in checked_ks(ks)
        ]
        self.protocol: Protocol | None = None
        """Of the last batch, in words."""
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("areas", zeros, dist_reduce_fx="sum")
        self.add_state("num_pairs", torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        images: Tensor,
        maps: Tensor | Explanation,
        pairs: Tensor | Sequence[tuple[int, int]],
    ) -> None:
        """Measure some pairs.

        Args:
            images: Float [B, C, H, W] in [0, 1].
            maps: Float [P, h, w] or [P, H, W], or the explanation of these pairs.
            pairs: Index in `images` and among all texts of each pair, int [P, 2].
        """
        scores = self._measure(images, maps, pairs=pairs)
        self.protocol = scores.protocol
        sums = torch.stack([scores[name].sum(dtype=torch.float64) for name in self.names])
        self.areas = self.areas + sums.to(self.areas)
        self.num_pairs = self.num_pairs + len(scores[self.names[0]])

    def compute(self) -> dict[str, Tensor]:
        """Mean area by name over all pairs, and `num_pairs`.

        Raises:
            ArgumentError: Nothing was added.
        """
        if self.num_pairs == 0:
            raise ArgumentError("no pair was added; call update first.")
        means = dict(zip(self.names, self.areas / self.num_pairs, strict=True))
        return means | {"num_pairs": self.num_pairs}


def _first_of_each(ids: Tensor) -> Tensor:
    """Whether an id comes here for the first time; nameless images always do."""
    order = ids.sort(stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[1:] = (order.values[1:] == order.values[:-1]) & (order.values[1:] != UNNAMED)
    return ~torch.empty_like(again).scatter_(0, order.indices, again)
