"""Explain a photograph with the models that `finetune_imagenette.py` trained.

    python examples/explain_photo.py --runs out/imagenette --weights ../shared/weights

Writes one figure a model. The photograph is scikit-learn's `china.jpg` (by danielbuechele, CC BY
2.0), which no model has seen; Imagenette's own photographs may not be passed on.
"""

import argparse
from pathlib import Path

import torch
from finetune_imagenette import make_model
from PIL import Image
from sklearn.datasets import load_sample_image

from shapwrap.data.folder import image_transform


def main() -> None:
    """One figure for each run that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("out/imagenette"))
    parser.add_argument("--weights", type=Path, required=True, help="as for finetune_imagenette")
    parser.add_argument("--size", type=int, default=112)
    options = parser.parse_args()
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    for path in sorted(options.runs.glob("*-shapley.pt")):
        name = path.stem.removesuffix("-shapley")
        state = torch.load(path, weights_only=True)
        # Only the readout with the class token has a layer for patches.
        prefix = "auto" if "patch_layer.weight" in state else "drop"
        wrapped = make_model(name, options.size, options.weights, prefix).eval()
        wrapped.load_state_dict(state)
        square = (options.size, options.size)
        transform = image_transform(square, wrapped.normalization, augment=False)
        images = transform(photograph)[None]
        explanation = wrapped.explain(images, contrast=True)
        probability = float(explanation.logits.softmax(dim=1).max())
        audit = wrapped.audit(images)
        print(f"{name}: probability {probability:.3f}, {audit}")
        explanation.plot(images).savefig(options.runs / f"{name}-photo.png", dpi=90)


if __name__ == "__main__":
    main()
