"""Vision transformers of users' own, each with something of its own in its attention."""

import math

import torch
from torch import nn
from torch.nn import functional

from tests.backbones import NUM_CLASSES


class OwnTransformer(nn.Module):
    """A class token, 4 x 4 patches, blocks of which `attend` and `join` are the subclass's."""

    width, heads = 12, 2

    def __init__(self, depth=2, places=6):
        super().__init__()
        self.embed = nn.Conv2d(3, self.width, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, self.width))
        self.positions = nn.Parameter(torch.randn(1, places + 1, self.width))
        self.norms = nn.ModuleList(nn.LayerNorm(self.width) for _ in range(2 * depth))
        self.qkv = nn.ModuleList(nn.Linear(self.width, 3 * self.width) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(depth))
        self.head = nn.Linear(self.width, NUM_CLASSES)
        self.drop = nn.Dropout(0.3)

    def split(self, tokens, block):
        q, k, v = self.qkv[block](tokens).chunk(3, dim=-1)
        return (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))

    def attend(self, tokens, block):
        q, k, v = self.split(tokens, block)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        attended = self.drop(scores.softmax(dim=-1)) @ v
        return self.out[block](attended.transpose(1, 2).flatten(2))

    def join(self, tokens, branch):
        return tokens + branch

    def enter(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        first = self.first.expand(len(images), -1, -1)
        return torch.cat((first, patches), dim=1) + self.positions

    def forward(self, images):
        tokens = self.enter(images)
        for block in range(len(self.qkv)):
            tokens = self.join(tokens, self.attend(self.norms[2 * block](tokens), block))
            hidden = self.mlp[block](self.norms[2 * block + 1](tokens))
            tokens = self.join(tokens, functional.gelu(hidden))
        return self.head(tokens[:, 0])


class Fused(OwnTransformer):
    """The same with PyTorch's fused attention."""

    def attend(self, tokens, block):
        q, k, v = self.split(tokens, block)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.out[block](attended.transpose(1, 2).flatten(2))


class DroppedWeights(OwnTransformer):
    """Draws in eval mode too."""

    def attend(self, tokens, block):
        attended = functional.scaled_dot_product_attention(
            *self.split(tokens, block), dropout_p=0.1
        )
        return self.out[block](attended.transpose(1, 2).flatten(2))


class TalkingHeads(OwnTransformer):
    """In its first block the heads are mixed after the softmax."""

    def attend(self, tokens, block):
        if block > 0:
            return super().attend(tokens, block)
        q, k, v = self.split(tokens, block)
        weights = (q @ k.transpose(-2, -1)).softmax(dim=-1).flip(1) * 0.5 + 0.1
        return self.out[block]((weights @ v).transpose(1, 2).flatten(2))


class InPlace(OwnTransformer):
    """Tokens are added to in place."""

    def join(self, tokens, branch):
        return tokens.clone().add_(branch)


class WithoutShortcut(OwnTransformer):
    """No residual stream."""

    def join(self, tokens, branch):
        return branch


class PostNorm(OwnTransformer):
    """The residual stream is normalised at each step."""

    def join(self, tokens, branch):
        return functional.layer_norm(tokens + branch, (self.width,))


class Cut(OwnTransformer):
    """No gradient reaches the blocks."""

    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class TwoPoolings(OwnTransformer):
    """The class token reads the tokens once more, as in class-attention layers."""

    def forward(self, images):
        tokens = self.enter(images)
        tokens = tokens + self.attend(tokens, 0)
        first = tokens[:, :1]
        for block in range(2):
            q, k, v = self.split(tokens, block)
            attended = functional.scaled_dot_product_attention(q[:, :, :1], k, v)
            first = first + self.out[block](attended.transpose(1, 2).flatten(2))
        return self.head(first[:, 0])


class Sequences(nn.Module):
    """torch's own encoder with tokens first, batch second; reads the mean of its tokens."""

    def __init__(self, batch_first=False):
        super().__init__()
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        layer = nn.TransformerEncoderLayer(
            12, 3, 24, batch_first=batch_first, norm_first=True, activation="gelu"
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(12, NUM_CLASSES)
        self.batch_first = batch_first

    def forward(self, images):
        patches = self.embed(images).flatten(2).transpose(1, 2)
        if self.batch_first:
            return self.head(self.encoder(patches).mean(dim=1))
        return self.head(self.encoder(patches.transpose(0, 1)).mean(dim=0))


class MarkedPatches(nn.Module):
    """Its class token looks at bright patches, and class 1 is how bright they are.

    Token: (brightness, 1, what was read); nothing else can reach the head.
    """

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(1, 3, bias=False)
        self.out.weight.data = torch.tensor([[0.0], [0.0], [1.0]])

    def forward(self, images):
        bright = functional.avg_pool2d(images, 4).mean(dim=1).flatten(1)
        one, none = torch.ones_like(bright), torch.zeros_like(bright)
        patches = torch.stack((bright, one, none), dim=2)
        first = patches.new_tensor([0.0, 1.0, 0.0]).expand(len(images), 1, 3)
        tokens = torch.cat((first, patches), dim=1)
        query = tokens[:, None, :, 1:2]
        key = value = tokens[:, None, :, 0:1]
        read = functional.scaled_dot_product_attention(query, key, value, scale=3.0)[:, 0]
        tokens = tokens + self.out(read)
        return torch.stack((-tokens[:, 0, 2], tokens[:, 0, 2]), dim=1)
