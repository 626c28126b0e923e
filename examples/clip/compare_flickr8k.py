r"""Retrieval, insertion and deletion of the models of `train_flickr8k.py`, as in Tables 4 to 6.

    python examples/clip/compare_flickr8k.py --data ../shared/data/flickr8k-1k

Methods explain the plain model, each image with its first caption. Writes `tables.md`,
`results.json`, `maps.png`, and `maps-alone.png` without the photographs, which nobody may pass on.
"""

# %% What is asked for
import argparse
from functools import partial
from pathlib import Path

import open_clip
import torch
from results_flickr8k import draw, write
from safetensors.torch import load_model
from train_flickr8k import CONTEXT, make_clip, transform

from shapwrap import Explanation, ShapleyCLIP
from shapwrap import explainers as ex
from shapwrap.clip import ZeroShotClassifier
from shapwrap.data import CaptionedImages, captioned_images
from shapwrap.metrics import predictor, retrieval, retrieval_insertion_deletion

METHODS = {
    "random": ex.RandomMap,
    "Grad-CAM": ex.CLIPGradCAM,
    "Rollout": ex.AttentionRollout,
    "Rollout, last block": partial(ex.AttentionRollout, blocks="last"),
    "GAME": ex.GAME,
    "GAME, last block": partial(ex.GAME, blocks="last"),
    "MaskCLIP": ex.MaskCLIP,
    "CLIPSurgery": ex.CLIPSurgery,
    "M2IB": ex.M2IB,
    "ECLIP": ex.ECLIP,
}
WRAPPED = {"wrapped": "patch values, no Shapley loss", "shapley": "**Ours**"}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--data", type=Path, required=True, help="holds the shards of the split")
parser.add_argument("--runs", type=Path, default=Path("out/flickr8k"))
parser.add_argument("--split", default="test")
for name, default in (("size", 112), ("text-width", 256), ("pairs", 1000), ("batch-size", 25)):
    parser.add_argument(f"--{name}", type=int, default=default)


# %% One model: its features, and what is measured of maps
class Subject:
    """A trained model and the data, as its embeddings see them."""

    def __init__(self, run: str, options: argparse.Namespace, tokenizer: object):
        model = make_clip(None, options.size, options.text_width)
        load_model(model, str(options.runs / f"{run}.safetensors"))
        self.model = model.eval()
        self.clip = None if run == "plain" else ShapleyCLIP(model, tokenizer=tokenizer).eval()
        shards = f"{options.data}/{options.split}-*.tar"
        self.data: CaptionedImages = next(captioned_images(shards, transform(model, augment=False)))
        encode = model.encode_image if self.clip is None else self.clip.encode_image
        statistics = (model.visual.image_mean, model.visual.image_std)
        self.encode = predictor(partial(encode, normalize=True), statistics)
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in statistics)
        self.pictures = (self.data.images * std + mean).clamp(0, 1)
        with torch.no_grad():
            self.texts = model.encode_text(tokenizer(self.data.captions), normalize=True)
            batches = self.pictures.split(options.batch_size)
            self.images = torch.cat([self.encode(batch) for batch in batches])
        first = (self.data.image_of_text.diff(prepend=torch.tensor([-1])) > 0).nonzero()[:, 0]
        self.captions = first[: options.pairs]

    def explain(self, method: object, batch_size: int) -> torch.Tensor:
        """Maps [P, h, w] of each image with its first caption, for any explainer."""
        rows = []
        for texts in self.captions.split(batch_size):
            images = self.data.images[self.data.image_of_text[texts]]
            explained: Explanation = method(images, texts)
            rows.append(explained.values.unflatten(1, explained.grid))
        return torch.cat(rows)

    def explain_itself(self, images: torch.Tensor, texts: torch.Tensor) -> Explanation:
        """A wrapped model's own explanation of matching pairs."""
        return self.clip.explain(images, self.texts[texts])

    def faithfulness(self, maps: torch.Tensor) -> dict[str, float]:
        """Insertion and deletion, T2I and I2T, R@1 and R@5."""
        of_text = self.data.image_of_text
        pairs = torch.stack((of_text[self.captions], self.captions), dim=1)
        return retrieval_insertion_deletion(
            self.encode, self.pictures, maps, self.texts, of_text, pairs=pairs, gallery=self.images
        ).mean()


# %% The tables
def main() -> None:
    """Measure; write tables as they grow."""
    options = parser.parse_args()
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
    recalls, curves, maps = {}, {}, {}
    for run in ("plain", *WRAPPED):
        subject = Subject(run, options, tokenizer)
        scores = retrieval(subject.images, subject.texts, subject.data.image_of_text)
        recalls.setdefault("chance", dict(scores.chance))
        recalls[run] = scores.mean()
        if subject.clip is not None:
            methods = {WRAPPED[run]: subject.explain_itself}
        else:
            plain = ZeroShotClassifier(subject.model, subject.texts, tokenizer=tokenizer)
            methods = {name: build(plain) for name, build in METHODS.items()}
        for name, method in methods.items():
            maps[name] = subject.explain(method, options.batch_size)
            curves[name] = subject.faithfulness(maps[name])
            print(name, curves[name], flush=True)
        write(options.runs, recalls, curves, options)
    first = subject.captions[:4]
    texts = [subject.data.captions[text] for text in first]
    draw(options.runs, subject.pictures[subject.data.image_of_text[first]], texts, maps)


if __name__ == "__main__":
    main()
