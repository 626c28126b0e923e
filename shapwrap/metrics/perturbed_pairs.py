"""Where the right one comes for matched pairs whose image is perturbed along the pair's map."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapwrap._types import Images
from shapwrap.clip.matching import Pairs
from shapwrap.errors import ShapwrapError
from shapwrap.explainers.explained_model import ExplainedModel
from shapwrap.metrics.candidates import DIRECTIONS, Candidates
from shapwrap.metrics.measured import rank_cells
from shapwrap.metrics.predictor import Predictor
from shapwrap.metrics.ranking import Ranking
from shapwrap.metrics.removal import FilledPixels, Interval, answers_without, filling

Places = dict[str, Int[Tensor, "pairs points"]]
"""Place of the right one, 1 for the first, by direction."""


@dataclass(frozen=True)
class PerturbedPairs:
    """Matched pairs of images and texts with a map each, among all candidates."""

    encode_image: ExplainedModel | Predictor
    images: Images
    """In [0, 1]."""
    maps: Float[Tensor, "pairs rows columns"]
    pairs: Pairs
    found: Candidates
    unit: str
    """What is ranked: "pixel" or "patch"."""
    grid: Sequence[int] | None
    chunk_size: int

    def ranking(self, block: Int[Tensor, " some"]) -> Ranking:
        """Cells of these maps, most relevant first.

        Raises:
            ArgumentError: An unknown unit, or a grid that is none or that the maps do not have.
        """
        size = (self.images.shape[-2], self.images.shape[-1])
        return rank_cells(self.maps[block], size, self.unit, self.grid)

    def places(
        self,
        points: Mapping[str, Sequence[Interval]],
        fills: Mapping[str, str | Tensor],
        generator: torch.Generator | None,
    ) -> tuple[dict[str, Places], int]:
        """Places by curve, and how many maps are constant.

        Maps are ranked `chunk_size` pairs at a time, so that memory does not grow with the pairs.

        Args:
            points: Ranks of the cells that are gone at each point, by curve.
            fills: What takes their place, by curve.
            generator: For the random filler.

        Raises:
            ArgumentError: A filler that cannot be had for these images.
            ShapwrapError: Embeddings that are not finite.
        """
        prepared = {
            curve: filling(self.encode_image, self.images, fill, generator)
            for curve, fill in fills.items()
        }
        parts: dict[str, list[Places]] = {curve: [] for curve in points}
        constant = 0
        rows = torch.arange(len(self.maps), device=self.maps.device)
        for block in rows.split(self.chunk_size):
            ranking = self.ranking(block)
            constant += int(ranking.constant.sum())
            ranks, image = ranking.of_pixels(), self.pairs.images[block]
            for curve, intervals in points.items():
                removal = FilledPixels(*prepared[curve], ranks, image)
                parts[curve].append(self._of_block(removal, intervals, self.pairs.texts[block]))
        joined = {
            curve: {way: torch.cat([part[way] for part in blocks]) for way in DIRECTIONS}
            for curve, blocks in parts.items()
        }
        return joined, constant

    def clean(self) -> Places:
        """Places of the images as they are in the gallery, one point."""
        parts: list[Places] = []
        for text in self.pairs.texts.split(self.chunk_size):
            own = self.found.image_of_text[text]
            asked = self.found.images[own]
            parts.append(
                {
                    "t2i": self.found.image_places(text),
                    "i2t": self.found.caption_places(asked, own),
                }
            )
        return {way: torch.cat([part[way] for part in parts])[:, None] for way in DIRECTIONS}

    def _of_block(
        self,
        removal: FilledPixels,
        intervals: Sequence[Interval],
        texts: Int[Tensor, " some"],
    ) -> Places:
        found = self.found
        parts: dict[str, list[Tensor]] = {way: [] for way in DIRECTIONS}
        defined: list[Tensor] = []
        for row, embeddings in answers_without(removal, intervals, self.chunk_size):
            features, text = embeddings.to(found.images.dtype), texts[row]
            defined.append(torch.isfinite(features).all(dim=1))
            parts["t2i"].append(found.image_places(text, features))
            parts["i2t"].append(found.caption_places(features, found.image_of_text[text]))
        # A comparison with NaN is false, which would count as a hit.
        if not torch.cat(defined).all():
            raise ShapwrapError(
                "embeddings of perturbed images hold NaN or infinity; expected finite ones. Run "
                "the model in float32."
            )
        shape = (len(texts), len(intervals))
        return {way: torch.cat(places).unflatten(0, shape) for way, places in parts.items()}
