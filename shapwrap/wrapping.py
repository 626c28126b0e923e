"""What happens once, when a model is wrapped: an adapter is chosen, and its claims are proved."""

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor, nn

from shapwrap._types import Coalitions, Grid, Images, Pairing
from shapwrap.backbones.base import Backbone
from shapwrap.backbones.densify import densify
from shapwrap.backbones.stride_one import StrideChange
from shapwrap.backbones.tokens import TokenBackbone
from shapwrap.choosing import Masking, Request, check_request, choose, logit_difference
from shapwrap.errors import ImageError, UnsupportedBackboneError
from shapwrap.masking.batch_norm import evaluation_mode
from shapwrap.probing import check_image_size, in_full_precision, random_images, undisturbed
from shapwrap.readout.head import Head


@dataclass
class Wrapping:
    """What was found out about a model."""

    backbone: Backbone
    head: Head
    masking: Masking
    grid: Grid
    image_size: tuple[int, int]
    max_logit_difference: float
    logit_scale: float
    class_token_dropped: bool
    registers_dropped: bool = False
    stride_changes: list[StrideChange] = field(default_factory=list)
    why_not_removal: str = ""
    request: Request = field(default_factory=Request)
    """What was asked for, which says more than what came of it: a saved model is wrapped anew."""

    def __post_init__(self) -> None:
        """The grid at the size of the probes is known."""
        self._grid_of_size = {self.image_size: self.grid}

    def grid_of(self, images: Images) -> Grid:
        """Rows and columns of patches of such images.

        Raises:
            ImageError: The backbone refuses this size.
        """
        size = (images.shape[-2], images.shape[-1])
        if size not in self._grid_of_size:
            with undisturbed(self.backbone.model):
                probe = random_images(self.backbone, size, batch=1)
                try:
                    self._grid_of_size[size] = check_image_size(self.backbone, probe)
                except UnsupportedBackboneError as error:
                    raise ImageError(f"at {size[0]} x {size[1]} pixels, {error}") from error
        return self._grid_of_size[size]

    def masked_means(
        self, images: Images, coalitions: Coalitions, paired: Pairing
    ) -> Float[Tensor, "batch coalitions pooled"]:
        """What the readout pools over each coalition, all other patches hidden."""
        backbone, embed = self.backbone, self.head.readout.embed
        if self.masking == "token-removal" and isinstance(backbone, TokenBackbone):
            return backbone.present_means(images, coalitions, paired=paired, embed=embed)
        return backbone.zero_masked_means(images, coalitions, self.grid_of(images), embed=embed)


def wrap(
    model: nn.Module, request: Request, grid: Grid | None
) -> tuple[Wrapping, nn.Module | None]:
    """Finds adapter, masking, readout and grid for a model; also returns a newly made head.

    Raises:
        ShapwrapError: A subclass that says what cannot be done and what to do.
    """
    check_request(request)
    _check_statistics(model)
    given = [request.head] if isinstance(request.head, nn.Module) else []
    with (
        undisturbed(model),
        evaluation_mode(module for head in given for module in head.modules()),
        in_full_precision(model, *given),
    ):
        choice = choose(model, request)
        backbone, images, head = choice.backbone, choice.images, choice.head
        difference = choice.logit_difference
        changes: list[StrideChange] = []
        native = backbone.features(images).grid
        if grid is not None and tuple(grid) != native:
            changes = densify(backbone, images, (int(grid[0]), int(grid[1])))
            difference = logit_difference(head, backbone, images, choice.original)
        drops_prefix = isinstance(backbone, TokenBackbone) and bool(backbone.unused_parameters())
        wrapping = Wrapping(
            backbone=backbone,
            head=head,
            masking=choice.masking,
            grid=backbone.features(images).grid,
            image_size=(images.shape[-2], images.shape[-1]),
            max_logit_difference=difference,
            logit_scale=float(choice.original.abs().max()),
            class_token_dropped=not choice.reads_patches,
            registers_dropped=choice.reads_patches and drops_prefix,
            stride_changes=changes,
            why_not_removal=choice.why_not_removal,
            request=request,
        )
    for made in (choice.new_head, head.patch_layer):
        if made is not None:
            made.to(backbone.parameter.dtype)
    return wrapping, choice.new_head


def _check_statistics(model: nn.Module) -> None:
    """Without running statistics, one image's logits depend on the rest of its batch."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise UnsupportedBackboneError(
                f"{name} of {type(model).__name__} is batch normalisation without running "
                "statistics: the value of a coalition would depend on the other images of its "
                "batch. Build it with track_running_stats=True."
            )


def unused_parameters(wrapping: Wrapping, new_head: nn.Module | None) -> list[nn.Parameter]:
    """Parameters that the wrapped model never reads: dropped tokens, a replaced classifier."""
    unused = wrapping.backbone.unused_parameters()
    if new_head is not None:
        replaced = [p for m in wrapping.backbone.classifiers() for p in m.parameters()]
        kept = {id(parameter) for parameter in new_head.parameters()}
        unused += [parameter for parameter in replaced if id(parameter) not in kept]
    return unused
