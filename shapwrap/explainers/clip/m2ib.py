"""M2IB: a bottleneck of noise in the image tower that keeps what matches the text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from shapwrap._types import Grid, Images
from shapwrap.arguments import check_at_least
from shapwrap.clip.zero_shot import ZeroShotClassifier
from shapwrap.errors import ArgumentError, UnsupportedBackboneError
from shapwrap.explainers.attention_intervention import (
    AttentionIntervention,
    batch_axis,
    batch_first,
)
from shapwrap.explainers.attention_recorder import Addition
from shapwrap.explainers.clip.clip_explainer import CLIPExplainer
from shapwrap.explainers.explained_model import Model
from shapwrap.explainers.gradients import in_full
from shapwrap.explainers.token_explainer import TokenLayout
from shapwrap.masking.pooling import without_autocast

FROM_THE_END = 3
"""By default the bottleneck follows block 9 of 12, counted from 0."""
FIRST_ALPHA = 5.0

Tokens = Float[Tensor, "batch tokens features"]


class M2IB(CLIPExplainer):
    """Information that each patch passes on through a bottleneck which keeps the match (nats).

    Tokens x after block `layer` become t = lam * x + (1 - lam) * eps, with lam = sigmoid(alpha),
    one alpha a token and channel that starts at 5, and eps standard normal. Adam changes alpha to
    minimise beta * mean KL - mean cos(image, text) over copies with other noise, where
    KL = -(1 + ln var - mu^2 - var) / 2, mu = lam * x and var = (1 - lam)^2. Values are the KL after
    the last step, summed over channels; never negative.

    The image side of the method. The model is not changed: the tokens are replaced as they are
    added up. The noise depends neither on the batch nor on calls before.

    Args:
        model: An image-text model with its texts.
        layer: Block after which the bottleneck lies, counted from 0; by default the third from the
            end, 9 of 12.
        beta: Price of information.
        steps: Of Adam.
        learning_rate: Of Adam.
        samples: Copies of each image with noise of their own.
        generator: Source of randomness, on the CPU; a new one with seed 0 if None. Drawn from once,
            for a seed of all calls.
        grid: Rows and columns of patches; by default those of the tower.
        chunk_size: Images that go through the model at a time, copies included.

    Raises:
        ArgumentError: An option outside its range.
        BackboneTypeError: No `ZeroShotClassifier`.

    References:
        Wang, Rudner & Wilson 2023, "Visual Explanations of Image-Text Representations via
        Multi-Modal Information Bottleneck Attribution", NeurIPS.
    """

    name = "m2ib"
    needs_residual_stream = True

    def __init__(
        self,
        model: Model,
        *,
        layer: int | None = None,
        beta: float = 0.1,
        steps: int = 10,
        learning_rate: float = 1.0,
        samples: int = 10,
        generator: torch.Generator | None = None,
        grid: Grid | None = None,
        chunk_size: int = 64,
    ):
        super().__init__(model, grid=grid, chunk_size=chunk_size)
        if layer is not None:
            check_at_least("layer", layer, 0)
        check_at_least("steps", steps, 1)
        check_at_least("samples", samples, 1)
        if not beta >= 0 or not learning_rate > 0:
            raise ArgumentError(
                f"beta is {beta} and learning_rate {learning_rate}; expected beta >= 0 and a "
                "positive learning rate."
            )
        self.layer = layer
        self.beta = beta
        self.steps = steps
        self.learning_rate = learning_rate
        self.samples = samples
        generator = generator or torch.Generator().manual_seed(0)
        self._seed = int(torch.randint(2**62, (), generator=generator))

    def maps_of(
        self, images: Images, target: Int[Tensor, " batch"], layout: TokenLayout
    ) -> Float[Tensor, "batch patches"]:
        """As many optimisations at a time as their copies fit into a chunk."""
        layer = self._layer(layout)
        size = max(1, self.chunk_size // self.samples)
        parts = zip(images.split(size), target.split(size), strict=True)
        return torch.cat([self._squeezed(*part, layer, layout) for part in parts])

    def _layer(self, layout: TokenLayout) -> int:
        if self.layer is None:
            return max(0, layout.last + 1 - FROM_THE_END)
        if self.layer > layout.last:
            raise ArgumentError(
                f"layer is {self.layer}, and the tower has {layout.last + 1} blocks; expected at "
                f"most {layout.last}."
            )
        return self.layer

    def _squeezed(
        self,
        images: Images,
        target: Int[Tensor, " batch"],
        layer: int,
        layout: TokenLayout,
    ) -> Float[Tensor, "batch patches"]:
        count = len(images)
        if layout.num_tokens == count:
            # One more image tells the axis of the images from that of the tokens.
            images, target = torch.cat((images, images[:1])), torch.cat((target, target[:1]))
        bottleneck = _Bottleneck(layer, layout, self.samples, len(images))
        generator = torch.Generator().manual_seed(self._seed)
        optimizer: torch.optim.Adam | None = None
        for _ in range(self.steps):
            cosines = bottleneck.cosines(self.classifier, images, target, generator)
            alpha = bottleneck.alpha
            if optimizer is None:
                optimizer = torch.optim.Adam([alpha], lr=self.learning_rate)
            with torch.enable_grad(), without_autocast(images):
                price = bottleneck.information().mean(dim=(1, 2))
                # A sum over images: each is optimised as if it were alone.
                loss = (self.beta * price - cosines.mean(dim=1)).sum()
            (alpha.grad,) = torch.autograd.grad(loss, alpha)
            optimizer.step()
        with torch.no_grad(), without_autocast(images):
            return bottleneck.information().sum(dim=2)[:count, layout.num_prefix :]


class _Bottleneck:
    """alpha, and the rule that puts noisy tokens in the place of those that a block gives."""

    def __init__(self, layer: int, layout: TokenLayout, samples: int, batch: int):
        self.layer = layer
        self.after = layout.additions[layer] - 1
        self.samples = samples
        self.batch = batch
        self.alpha: Tokens = torch.empty(0)
        self.tokens: Tokens = torch.empty(0)
        self._noise: torch.Generator = torch.Generator()

    def cosines(
        self,
        classifier: ZeroShotClassifier,
        images: Images,
        target: Int[Tensor, " batch"],
        noise: torch.Generator,
    ) -> Float[Tensor, "batch samples"]:
        """Of each copy with the text; gradients reach alpha."""
        self._noise = noise
        with torch.no_grad():
            with AttentionIntervention(addition=self):
                cosines = classifier.cosines(images)
            # The rule turned gradients on, at the bottleneck.
            if len(cosines) != self.batch * self.samples or not cosines.requires_grad:
                raise UnsupportedBackboneError(
                    f"the tower gives {len(cosines)} embeddings for {self.batch * self.samples} "
                    "copies of its tokens, or lets no gradient reach them; expected blocks that "
                    "take any number of images."
                )
            texts = target.repeat_interleave(self.samples)
            asked = cosines.gather(1, texts[:, None])
            return asked.reshape(self.batch, self.samples)

    def __call__(self, index: int, number: int, addition: Addition) -> Tensor:
        if (index, number) != (self.layer, self.after):
            return addition.result
        axis = batch_axis(addition.result, self.batch)
        with torch.no_grad():
            self.tokens = in_full(batch_first(addition.result, self.batch))
            if not len(self.alpha):
                self.alpha = torch.full_like(self.tokens, FIRST_ALPHA)
            # The same noise for every image, so that no image depends on its batch.
            shape = (self.samples, *self.tokens.shape[1:])
            drawn = torch.randn(shape, generator=self._noise, dtype=self.tokens.dtype)
            noise = drawn.to(self.tokens.device)
        self.alpha.requires_grad_()
        torch.set_grad_enabled(True)
        kept = self.alpha.sigmoid()[:, None]
        mixed = kept * self.tokens[:, None] + (1 - kept) * noise
        return mixed.flatten(0, 1).movedim(0, axis).to(addition.result.dtype)

    def information(self) -> Tokens:
        """KL of each token and channel from noise."""
        mean = self.alpha.sigmoid() * self.tokens
        # ln (1 - lam) is finite however large alpha is.
        log_variance = 2 * functional.logsigmoid(-self.alpha)
        return -0.5 * (1 + log_variance - mean**2 - log_variance.exp())
