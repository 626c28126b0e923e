"""The Shapley loss in a training loop of your own: six lines, marked, and nothing else changes.

    python examples/plain_pytorch.py

Two functions train the same network on the same images, the first plainly. The lines of the second
that end in `# shapwrap` are the difference. Needs neither a download nor a GPU.
"""

# %% What everybody imports, and one line
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from shapwrap import ShapleyWrapper, sample_coalitions, shapley_loss  # shapwrap


# %% Images: noise with one bright square, whose colour is the class
def squares(number: int, seed: int, size: int = 64, cell: int = 16) -> TensorDataset:
    """Images [number, 3, size, size] and their classes, 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, size, size, generator=generator) * 0.3
    labels = torch.randint(3, (number,), generator=generator)
    corners = torch.randint(size // cell, (number, 2), generator=generator) * cell
    for image, label, (row, column) in zip(images, labels, corners.tolist(), strict=True):
        image[label, row : row + cell, column : column + cell] += 2
    return TensorDataset(images, labels)


def make_model() -> nn.Module:
    """A small vision transformer with random weights, the same at each call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model("test_vit", num_classes=3, img_size=64)


# %% Somebody's training loop
def train_plainly(model: nn.Module, loader: DataLoader, epochs: int) -> nn.Module:
    """The model, trained to classify."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            logits = model(images)
            loss = cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


# %% The same loop, and the model explains itself
def train(model: nn.Module, loader: DataLoader, epochs: int) -> ShapleyWrapper:
    """The model, trained to classify and to explain what it does."""
    model = ShapleyWrapper(model)  # shapwrap
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            coalitions = sample_coalitions(len(images), model.num_patches)  # shapwrap
            output = model(images, coalitions, paired=True)  # shapwrap
            logits = output.logits  # shapwrap
            loss = cross_entropy(logits, labels)
            loss = loss + shapley_loss(output)  # shapwrap
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


# %% Both, on the same data in the same order
EPOCHS = 8
train_set, test_set = squares(256, seed=1), squares(64, seed=2)
images, labels = test_set.tensors
results = {}
for name, fit in (("plain", train_plainly), ("shapley", train)):
    order = torch.Generator().manual_seed(3)
    loader = DataLoader(train_set, batch_size=32, shuffle=True, generator=order)
    trained = fit(make_model(), loader, EPOCHS)
    wrapped = trained if isinstance(trained, ShapleyWrapper) else ShapleyWrapper(trained).eval()
    with torch.no_grad():
        accuracy = (wrapped(images).argmax(dim=1) == labels).float().mean().item()
    skill = wrapped.audit(images).overall_skill
    results[name] = {"accuracy": accuracy, "skill": skill}
    print(f"{name}: accuracy {accuracy:.2f}, skill {skill:.2f}")

# %% An explanation: the values of the patches, and what they sum to
explanation = wrapped.explain(images[:1])
print(f"class {explanation.target.item()}, its logit above the baseline in 4 x 4 patches:")
print(explanation.values.view(explanation.grid))
