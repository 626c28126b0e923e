"""Insertion and deletion for retrieval: how soon the right one is found, and how soon lost."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shapwrap.arguments import check_at_least
from shapwrap.errors import ArgumentError, MapError
from shapwrap.explainers.explained_model import ExplainedModel, Model
from shapwrap.explanation import Explanation
from shapwrap.metrics.candidates import DIRECTIONS, Candidates, checked_ks
from shapwrap.metrics.fillers import check_fill, describe, is_native
from shapwrap.metrics.fractions_removed import removed_counts
from shapwrap.metrics.matched_pairs import check_gallery, matched
from shapwrap.metrics.measured import checked_images, running, seed_of, warn_of_normalization
from shapwrap.metrics.perturbed_pairs import PerturbedPairs
from shapwrap.metrics.predictor import Predictor
from shapwrap.metrics.protocol import ItemScores, Protocol
from shapwrap.metrics.ranking import ConstantMapWarning, check_maps
from shapwrap.metrics.removal import Interval, clean_logits
from shapwrap.metrics.retrieval_recall import hits


class RetrievalCurves(ItemScores):
    """Normalised areas under the curves of each pair, by curve, direction and k."""

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        curves: Mapping[str, Tensor],
        fractions: Mapping[str, Tensor],
        protocol: Protocol,
    ):
        super().__init__(values, protocol=protocol)
        self.curves = dict(curves)
        """1 where the pair is found at a point, else 0, float [P, S], by the names of the areas;
        means over pairs are recalls."""
        self.fractions = dict(fractions)
        """Share of the cells that are inserted or deleted at each point, float [S], by curve."""

    def _item(self, metric: str) -> str:
        return "pairs"


def retrieval_insertion_deletion(
    encode_image: Model,
    images: Tensor,
    maps: Tensor | Explanation,
    text_features: Tensor,
    image_of_text: Tensor | Sequence[int],
    *,
    pairs: Tensor | Sequence[tuple[int, int]] | None = None,
    gallery: Tensor | None = None,
    ks: Sequence[int] = (1, 5),
    fill: str | Tensor = "random",
    insertion_fill: str | Tensor = "black",
    steps: int = 10,
    fractions: Sequence[float] | Tensor | None = None,
    ranking: str = "pixel",
    grid: Sequence[int] | None = None,
    chunk_size: int = 64,
    generator: torch.Generator | None = None,
) -> RetrievalCurves:
    """Areas under recall curves while the image of each pair is inserted or deleted.

    A mapping with float tensors [P], one number a matched pair of image and text:
    `insertion_t2i_r@<k>` and `insertion_i2t_r@<k>` (higher is better), `deletion_t2i_r@<k>` and
    `deletion_i2t_r@<k>` (lower is better), in [0, 1]. `.mean()` has the scores, `.curves` the hits
    at each point, `.fractions` the shares of cells there, `.protocol` every choice, in words.

    At each point the image of a pair is perturbed along the pair's map and encoded again. I2T: it
    hits if any text of the image is among its first k of all texts. T2I: the pair's text hits if
    the perturbed image is among its first k, all other images of the gallery being clean. The clean
    image is the first point of deletion, at share 0, and the last of insertion, at share 1. The
    area is that of the trapezoids, divided by the range of shares. Ties count against.

    Args:
        encode_image: Images in [0, 1] to the embeddings [B, E] that are compared, normalisation
            included: `predictor(clip.tower)` for a `ShapleyCLIP`, another predictor or a function.
            A module runs in eval mode.
        images: Float [B, C, H, W] in [0, 1], in the frame that the model reads.
        maps: Float [P, h, w], one value a patch, or [P, H, W], one a pixel; or the explanation of
            these pairs.
        text_features: Float [T, E], compared as they are, as in `retrieval`.
        image_of_text: Index in the gallery of the image of each text, int [T].
        pairs: Index in `images` and in `text_features` of each pair, int [P, 2]; if None, every
            text with its image, in the order of the texts, and `images` are the gallery.
        gallery: Embeddings of all clean images, float [I, E], as `encode_image` makes them; if
            None, `images` are the gallery.
        ks: Which k.
        fill: What deletion puts in place of pixels, as in `faithfulness`, but not "native".
        insertion_fill: What insertion starts from.
        steps: How many points beside the clean one, from 50 % / steps to 50 % of the cells.
        fractions: Instead of `steps`: shares of the cells, in increasing order.
        ranking: "pixel" or "patch", as in `faithfulness`.
        grid: Rows and columns of patches, for ranking="patch" of pixel maps.
        chunk_size: Perturbed images that are encoded at a time, and pairs whose maps are ranked at
            a time. Results do not depend on it, up to the rounding of the model.
        generator: For the filler "random", drawn once an image; a new one with seed 0 if None.

    Raises:
        ImageTypeError: Images that are not floating point.
        ImageError: Images of another shape, or outside [0, 1].
        MapError: Not one map a pair, or with NaN or infinity.
        ArgumentError: Features, indices or pairs that do not fit, a gallery that `encode_image`
            did not make of these images, or an option outside its range.
        UnsupportedBackboneError: `encode_image` gives something else than embeddings [B, E].
        ShapwrapError: Embeddings of perturbed images that are not finite.

    References:
        Fan, Yang & Ma 2026, AAAI-26, Tables 5 and 6, which do not state their protocol.
        Zhao et al. 2024, "Gradient-based Visual Explanation for Transformer-based CLIP": shares and
        fillers, for zero-shot classification.
    """
    check_at_least("chunk_size", chunk_size, 1)
    wanted = checked_ks(ks)
    fills = {"insertion": insertion_fill, "deletion": fill}
    for each in fills.values():
        _check_filler(each)
    images = checked_images(images).detach()
    warn_of_normalization(encode_image, stacklevel=3)
    known = encode_image if isinstance(encode_image, Predictor) else ExplainedModel(encode_image)
    with running(encode_image):
        clean = clean_logits(ExplainedModel(encode_image), images, chunk_size)
        shown = clean if gallery is None else gallery
        found = Candidates.checked(shown, text_features, image_of_text)
        chosen = matched(pairs, found, len(images), images_are_gallery=gallery is None)
        check_gallery(clean, chosen, found)
        given = check_maps(_tensor_of(maps, images), images, len(chosen.texts), "one map a pair")
        perturbed = PerturbedPairs(known, images, given, chosen, found, ranking, grid, chunk_size)
        first = perturbed.ranking(torch.zeros(1, dtype=torch.long, device=given.device))
        cells = first.num_cells
        counts = _counts(cells, steps, fractions)
        points: dict[str, list[Interval]] = {
            "insertion": [(count, cells) for count in counts],
            "deletion": [(0, count) for count in counts],
        }
        places, constant = perturbed.places(points, fills, generator)
        as_is = perturbed.clean()
    if constant:
        warnings.warn(
            f"{constant} of {len(given)} maps are constant: their order is that of the rows, row "
            "by row.",
            ConstantMapWarning,
            stacklevel=2,
        )
    shares = {"insertion": [*counts, cells], "deletion": [0, *counts]}
    x = {curve: torch.tensor(each, device=images.device) / cells for curve, each in shares.items()}
    whole = {
        f"insertion_{way}": torch.cat((places["insertion"][way], as_is[way]), dim=1)
        for way in DIRECTIONS
    } | {
        f"deletion_{way}": torch.cat((as_is[way], places["deletion"][way]), dim=1)
        for way in DIRECTIONS
    }
    curves = hits(whole, wanted)
    settings = {
        "definition": "shapwrap's own, for retrieval",
        "encoder": repr(known) if isinstance(known, Predictor) else _name(encode_image),
        "perturbed": f"{tuple(images.shape)} in [0, 1], {images.dtype}, {images.device.type}",
        "pairs": f"{len(given)}, matched",
        **found.settings(),
        "T2I": "the text against the clean gallery with its own image perturbed",
        "I2T": "the perturbed image against all texts",
        "ranking": f"{first.unit}, N = {cells}, most relevant first, stable",
        "deletion": f"from the image to: {describe(fill)}",
        "insertion": f"to the image from: {describe(insertion_fill)}",
        "points": f"{counts} cells, and the clean image, {cells} inserted and 0 deleted",
        "area": "trapezoids over the share of cells, divided by the range of shares",
        "seed": seed_of(generator, fill, insertion_fill),
    }
    return RetrievalCurves(
        {name: _area(curve, x[name.partition("_")[0]]) for name, curve in curves.items()},
        curves=curves,
        fractions=x,
        protocol=Protocol.of("insertion and deletion for retrieval", settings),
    )


def _check_filler(fill: str | Tensor) -> None:
    check_fill(fill)
    if is_native(fill):
        raise ArgumentError(
            "fill is 'native', which plain models do not have; expected a filler of pixels, so "
            "that all methods and models are measured alike."
        )


def _tensor_of(maps: Tensor | Explanation, images: Tensor) -> Tensor:
    """Values of pixels where a method has them, of patches otherwise.

    Raises:
        MapError: An explanation of images of another size, whose frame may be another crop.
    """
    if not isinstance(maps, Explanation):
        return maps
    size = (images.shape[-2], images.shape[-1])
    if tuple(maps.image_size) != size:
        raise MapError(
            f"the explanation is of images of {maps.image_size[0]} x {maps.image_size[1]} pixels, "
            f"the images have {size[0]} x {size[1]}; expected one frame for both. Explain the "
            "images as they are perturbed, or pass maps drawn in their frame."
        )
    if maps.pixels is not None:
        return maps.pixels
    if maps.covered is None or maps.covered == maps.image_size:
        return maps.values.unflatten(1, maps.grid)
    return maps.heatmap()


def _counts(cells: int, steps: int, fractions: Sequence[float] | Tensor | None) -> list[int]:
    """Number of cells that are inserted or deleted at each point.

    Raises:
        ArgumentError: No step, shares outside [0, 1] or not in order, or no range of shares.
    """
    if fractions is None:
        check_at_least("steps", steps, 1)
        counts = [cells * step // (2 * steps) for step in range(1, steps + 1)]
    else:
        counts = removed_counts(cells, steps, fractions)
    if counts != sorted(counts) or counts[-1] == 0 or counts[0] == cells:
        raise ArgumentError(
            f"of {cells} cells, {counts} are inserted and deleted; expected fractions in "
            "increasing order, the first below 1, the last at least one cell."
        )
    return counts


def _area(curve: Float[Tensor, "pairs points"], x: Float[Tensor, " points"]) -> Tensor:
    return torch.trapezoid(curve, x) / (x[-1] - x[0])


def _name(encode: Model) -> str:
    return getattr(encode, "__name__", type(encode).__name__)
