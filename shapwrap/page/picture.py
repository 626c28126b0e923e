"""Images inside a page."""

import base64
from io import BytesIO

from jaxtyping import Float
from torch import Tensor

LONGEST_SIDE = 480
"""Pixels; a page shows images no larger."""


def data_uri(pixels: Float[Tensor, "channels height width"]) -> str:
    """A PNG, or a JPEG where that is smaller, as a data URI; other than 3 channels as their mean.

    Args:
        pixels: In [0, 1], on the CPU.
    """
    from PIL import Image

    channels = pixels if pixels.shape[0] == 3 else pixels.mean(dim=0, keepdim=True)
    drawn = (channels * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(drawn if drawn.shape[2] == 3 else drawn[:, :, 0])
    if max(picture.size) > LONGEST_SIDE:
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    files: dict[str, bytes] = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85})):
        file = BytesIO()
        picture.save(file, kind, **options)
        files[kind] = file.getvalue()
    kind = min(files, key=lambda name: len(files[name]))
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"
