"""Handwritten digits on cluttered canvases: a labelled image set with known evidence."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from shapwrap.errors import ArgumentError, MissingDependencyError

NUM_TEST_DIGITS = 500
"""The last digits of scikit-learn's set; they come from other writers than the first ones."""

STROKE = 0.35
"""Ink above which a pixel belongs to the digit."""


class DigitScene(NamedTuple):
    """One canvas, its label and where the evidence for the label lies."""

    image: Float[Tensor, "3 height width"]
    """Pixels, normalised with mean and standard deviation 0.5."""
    label: int
    evidence: Bool[Tensor, "height width"]
    """True on the strokes of the digit."""


class ClutteredDigits(Dataset[tuple[Tensor, int]]):
    """One digit an image, among scrambled digits, on a coloured, noisy background.

    A distractor is another digit whose halves change places: strokes alike, no digit. Each
    scene depends on `seed` and its index alone.

    Args:
        split: "train" or "test"; no digit, and no writer of the test digits, is in both.
        num_images: Length of the set.
        image_size: Height and width in pixels, at least 48.
        distractors: Scrambled digits a canvas.
        seed: Of the scenes.

    Raises:
        ArgumentError: An unknown split, a length below 1 or a canvas that is too small.
        MissingDependencyError: scikit-learn is not installed.
    """

    normalization = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        split: Literal["train", "test"] | str = "train",
        *,
        num_images: int = 1000,
        image_size: tuple[int, int] = (112, 112),
        distractors: int = 3,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise ArgumentError(f"split is {split!r}; expected 'train' or 'test'.")
        if num_images < 1 or min(image_size) < 48 or distractors < 0:
            raise ArgumentError(
                f"num_images is {num_images}, image_size {image_size}, distractors {distractors}; "
                "expected at least 1 image, 48 x 48 pixels and no negative number."
            )
        digits, labels = load_digits()
        chosen = slice(NUM_TEST_DIGITS, None) if split == "train" else slice(NUM_TEST_DIGITS)
        self._digits, self._labels = digits.flip(0)[chosen], labels.flip(0)[chosen]
        self._size = image_size
        self._distractors = distractors
        self._seed = seed
        self._is_test = int(split == "test")
        self._length = num_images

    def __len__(self) -> int:
        """Number of images."""
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image and label."""
        scene = self.scene(index)
        return scene.image, scene.label

    def scene(self, index: int) -> DigitScene:
        """Image, label and evidence.

        Raises:
            IndexError: Past the end, as a sequence does.
        """
        if not 0 <= index < self._length:
            raise IndexError(f"index {index} of {self._length} images")
        # torch's CPU generator reads 32 bits of a seed; the sequence mixes all three numbers in.
        mixed = np.random.SeedSequence([self._seed, self._is_test, index]).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        which = int(torch.randint(len(self._digits), (), generator=generator))
        canvas = self._background(generator)
        taken = torch.zeros(self._size, dtype=torch.bool)
        evidence = self._place(canvas, taken, self._digits[which], generator)
        for _ in range(self._distractors):
            other = int(torch.randint(len(self._digits), (), generator=generator))
            self._place(canvas, taken, _scrambled(self._digits[other], generator), generator)
        noise = 0.03 * torch.randn(canvas.shape, generator=generator)
        image = (canvas + noise).clamp(0, 1)
        return DigitScene((image - 0.5) / 0.5, int(self._labels[which]), evidence)

    def _background(self, generator: torch.Generator) -> Tensor:
        coarse = torch.rand(1, 3, 4, 4, generator=generator) * 0.4
        return functional.interpolate(coarse, size=self._size, mode="bicubic")[0].clamp(0, 1)

    def _place(
        self, canvas: Tensor, taken: Tensor, glyph: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Draw a glyph where there is room, in place; returns its strokes."""
        height, width = self._size
        side = int(min(self._size) * (0.27 + 0.08 * float(torch.rand((), generator=generator))))
        ink = functional.interpolate(glyph[None, None], size=(side, side), mode="bicubic")[0, 0]
        ink = ink.clamp(0, 1)
        color = 0.55 + 0.45 * torch.rand(3, 1, 1, generator=generator)
        strokes = torch.zeros(self._size, dtype=torch.bool)
        for _ in range(30):
            top = int(torch.randint(height - side + 1, (), generator=generator))
            left = int(torch.randint(width - side + 1, (), generator=generator))
            window = (slice(top, top + side), slice(left, left + side))
            if not taken[window].any():
                taken[window] = True
                area = canvas[:, window[0], window[1]]
                area.copy_(area * (1 - ink) + color * ink)
                strokes[window] = ink > STROKE
                break
        return strokes


def load_digits() -> tuple[Float[Tensor, "1797 8 8"], Tensor]:
    """scikit-learn's handwritten digits, ink in [0, 1], and their labels.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise MissingDependencyError(
            "the digits come with scikit-learn; run: pip install 'shapwrap[demo]'"
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    digits = torch.as_tensor(pixels).float().view(-1, 8, 8) / 16
    return digits, torch.as_tensor(labels)


def _scrambled(glyph: Tensor, generator: torch.Generator) -> Tensor:
    """The glyph with left and right halves swapped, and in half of the cases top and bottom too."""
    swapped = glyph.roll(4, dims=1)
    return swapped.roll(4, dims=0) if torch.rand((), generator=generator) < 0.5 else swapped
