"""Find images by words with FAISS, and explain only what is found.

    python examples/retrieval_faiss.py photographs/ --query "a dog on a beach" \
        --model ViT-B-16 --pretrained laion2b_s34b_b88k

Takes a folder of images or tar shards (WebDataset), and writes `hits.json` and `hits.png`. The
index holds one vector an image, whatever may be asked later; an explanation costs one pass of the
image tower, and is made for the hits alone. pip install 'shapwrap[retrieval,open-clip,plot]'.
"""

# %% What is asked for, where
import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import open_clip
import torch
from PIL import Image

from shapwrap import ShapleyCLIP
from shapwrap.errors import ArgumentError, MissingDependencyError

try:
    import faiss
except ImportError as error:
    raise MissingDependencyError(
        "this example searches with FAISS; run: pip install 'shapwrap[retrieval]'"
    ) from error

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("images", type=Path, nargs="+", help="folders of images, or tar shards")
parser.add_argument("--query", required=True)
parser.add_argument("--model", default="ViT-B-16", help="a name of open_clip")
parser.add_argument("--pretrained", help="a tag of open_clip, or a file; random weights without")
parser.add_argument("--config", type=Path, help="JSON of a model of your own, named as the file")
parser.add_argument("--hits", type=int, default=5)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, default=Path("out/retrieval"))
options = parser.parse_args()

# %% The model, wrapped: similarities are sums over patches
if options.config is not None:
    open_clip.add_model_config(options.config)
name = options.model if options.config is None else options.config.stem
torch.manual_seed(0)
model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=options.pretrained)
clip = ShapleyCLIP(model, tokenizer=open_clip.get_tokenizer(name)).to(options.device).eval()


# %% The images, one after the other
def read_files() -> Iterator[tuple[str, bytes]]:
    """Path and bytes of each image."""
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    for source in options.images:
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.suffix.lower() in suffixes:
                    yield str(path), path.read_bytes()
        else:
            with tarfile.open(source) as shard:
                for member in shard:
                    if member.isfile() and member.name.lower().endswith(suffixes):
                        yield f"{source}/{member.name}", shard.extractfile(member).read()


def read_images(wanted: set[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and pixels as the model takes them; files that cannot be decoded are named and left."""
    for path, content in read_files():
        if wanted is None or path in wanted:
            try:
                yield path, preprocess(Image.open(io.BytesIO(content)))
            except OSError as error:
                print(f"left out {path}: {error}")


# %% The index: inner products, for the length of an embedding is a part of its similarities
index, names = None, []
images = read_images()
while batch := list(islice(images, options.batch_size)):
    with torch.no_grad():
        embeddings = clip.encode_image(torch.stack([x for _, x in batch]).to(options.device))
    index = faiss.IndexFlatIP(embeddings.shape[1]) if index is None else index
    index.add(embeddings.float().cpu().numpy())
    names += [path for path, _ in batch]
if index is None:
    raise ArgumentError(f"no image in {options.images}; expected folders of images or tar shards.")

# %% The search, and an explanation of each hit
with torch.no_grad():
    query = clip.text_features(options.query)
scores, found = index.search(query.float().cpu().numpy(), min(options.hits, len(names)))
hits = [names[i] for i in found[0]]
pixels = dict(read_images(set(hits)))
shown = torch.stack([pixels[path] for path in hits]).to(options.device)
explanation = clip.explain(shown, query)

# %% What was found, and where it is to be seen
options.out.mkdir(parents=True, exist_ok=True)
table = [
    {"image": path, "similarity": float(score), "sum_of_patches": float(values.sum())}
    for path, score, values in zip(hits, scores[0], explanation.values, strict=True)
]
for row in table:
    print(f"{row['similarity']:.4f} = {row['sum_of_patches']:.4f} over patches  {row['image']}")
(options.out / "hits.json").write_text(json.dumps(table, indent=2) + "\n")
figure = explanation.plot(shown, class_names=[options.query], max_images=len(hits))
figure.savefig(options.out / "hits.png", dpi=90)
