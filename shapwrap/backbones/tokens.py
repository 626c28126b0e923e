"""Token models with global attention: patches can be removed before the first block."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn

from shapwrap._types import (
    Coalitions,
    Grid,
    Images,
    Pairing,
    PatchFeatures,
    PatchMask,
    PooledFeatures,
)
from shapwrap.backbones.attention_pooling import Part
from shapwrap.backbones.base import Backbone, Embedding, FeatureMap
from shapwrap.backbones.positions import Positions
from shapwrap.errors import ArgumentError
from shapwrap.masking.attention import (
    AttentionMask,
    hidden_prefix_mask,
    pair_mask,
    removal_mask,
)
from shapwrap.masking.pooling import present_means

PrefixTokens = Literal["drop", "keep"]
Tokens = Float[Tensor, "items tokens features"]
RunCoalitions = Bool[Tensor, "run coalitions patches"]
"""The first of each pair, or all: those that take a pass."""
EncodedTokens = Float[Tensor, "items tokens encoded"]


class TokenSequence(NamedTuple):
    """What enters the first block."""

    prefix: Tokens
    """Class and register tokens; may be of length 0."""
    patches: Tokens
    positions: Positions | None
    """What the blocks must be told of the tokens' places; None if the tokens hold it all."""
    grid: Grid

    def take(self, patches: Tensor) -> "TokenSequence":
        """The sequence of these patches alone, in this order, after the same prefix."""
        positions = None if self.positions is None else self.positions.take(patches)
        return self._replace(patches=self.patches[:, patches], positions=positions)

    @property
    def prefix_has_slots(self) -> bool:
        """Whether a prefix that is out of sight must stay in the sequence all the same."""
        return self.positions is not None and self.positions.prefix_has_slots


class TokenBackbone(Backbone):
    """A backbone whose only mixing of tokens is global attention.

    That claim is proved, not assumed: see `shapwrap.backbones.removal_test`.
    """

    prefix_tokens: PrefixTokens = "drop"
    """Whether patches can see class and register tokens."""

    reads_class_token: bool = False
    """Whether the features of a patch are followed by the class token; see `read_class_token`."""

    @abstractmethod
    def embed(self, images: Images) -> TokenSequence:
        """Tokens with their positions, before anything has mixed them."""

    def embed_present(
        self, images: Images, coalitions: Coalitions, *, paired: bool
    ) -> TokenSequence:
        """Tokens for each coalition, [B * S, ...], those of present patches free of all others.

        With `paired`, absent patches form a coalition of their own, and their tokens are free of
        those that are present. Where each token depends on the pixels of its patch alone, as here,
        all coalitions have the same tokens.
        """
        sequence = self.embed(images)
        prefix, patches = (
            repeat(tokens, "b t d -> (b s) t d", s=coalitions.shape[1])
            for tokens in (sequence.prefix, sequence.patches)
        )
        return sequence._replace(prefix=prefix, patches=patches)

    @abstractmethod
    def encode(
        self, tokens: Tokens, positions: Positions | None, mask: AttentionMask | None
    ) -> EncodedTokens:
        """All blocks and the final norm: one token out for each token in."""

    @abstractmethod
    def original_tokens(self, images: Images) -> Tokens:
        """What the model itself computes before pooling, prefix tokens first."""

    @abstractmethod
    def prefix_parameters(self) -> list[nn.Parameter]:
        """Class and register tokens."""

    def unused_parameters(self) -> list[nn.Parameter]:
        """The prefix tokens, where patches cannot see them."""
        return self.prefix_parameters() if self.prefix_tokens == "drop" else []

    def choose_prefix(self, prefix_tokens: str, *, head_reads_patches: bool) -> None:
        """Keeps registers where the pretrained head stays exact with them, else drops them.

        Raises:
            ArgumentError: Not "auto", "drop" or "keep".
        """
        if prefix_tokens == "auto":
            self.prefix_tokens = "keep" if head_reads_patches else "drop"
        elif prefix_tokens == "keep" or prefix_tokens == "drop":
            self.prefix_tokens = prefix_tokens
        else:
            raise ArgumentError(
                f"prefix_tokens is {prefix_tokens!r}; expected 'auto', 'drop' or 'keep'."
            )

    def read_class_token(self) -> None:
        """From now on each patch feature is followed by what the class token says, [e_n, c].

        c is the class token of the image, or of the coalition, that the patch belongs to; its mean
        over any of the patches is itself.
        """
        self.prefix_tokens = "keep"
        self.reads_class_token = True

    def read_by_head(self, pooled: PooledFeatures) -> Float[Tensor, "items read"]:
        """The class token's half, where the head reads that."""
        return pooled.chunk(2, dim=-1)[1] if self.reads_class_token else pooled

    def class_token_alone(self) -> PooledFeatures:
        """[1, D], what the class token says of no patch at all; the same for all images."""
        size = self.image_size()
        images = torch.zeros(1, self.in_channels(size), *size).to(self.parameter)
        sequence = self.embed(images)
        nobody = torch.arange(0, device=images.device)
        alone = sequence.take(nobody)
        tokens, positions, _ = self._assemble(alone, [alone.prefix])
        return self.encode(tokens, positions, None)[:, 0]

    def features(self, images: Images) -> FeatureMap:
        """Patch features of the whole image."""
        encoded, sequence, num_prefix = self.whole_tokens(images)
        everyone = encoded.new_ones(encoded.shape[:2], dtype=torch.bool)
        return FeatureMap(self.read(encoded, everyone, num_prefix, copies=1), sequence.grid)

    def weigh(self, tokens: EncodedTokens, part: Part, num_prefix: int) -> PatchFeatures:
        """Patch features whose mean is what the head reads; by default the patch tokens.

        Args:
            tokens: All tokens after the final norm.
            part: Two parts of the tokens that know nothing of each other; a head that weighs
                tokens against each other does so within each part.
            num_prefix: Tokens at the start that are no patches.
        """
        return tokens[:, num_prefix:]

    def masked_features(self, images: Images, present: PatchMask) -> PatchFeatures:
        """Patch features of images whose absent patches are zeroed."""
        encoded, _, num_prefix = self.whole_tokens(images)
        part = torch.cat((present.new_ones(len(present), num_prefix), present), dim=1)
        return self.read(encoded, part, num_prefix, copies=1)

    def present_means(
        self,
        images: Images,
        coalitions: Coalitions,
        *,
        paired: Pairing,
        embed: Embedding | None = None,
    ) -> Float[Tensor, "batch coalitions pooled"]:
        """Mean feature over the patches of each coalition, the others removed before block 1.

        Args:
            images: Normalised pixels.
            coalitions: True where a patch is present.
            paired: How the coalitions are complements of each other; two of them then take one
                pass over the tokens.
            embed: What is done to the features of each patch before the mean.
        """
        # The second of a pair needs no pass of its own.
        run = coalitions[0::2] if paired == "across" else coalitions
        run = run[:, 0::2] if paired is True else run
        removed = self.removed_tokens(images, run, paired=paired)
        features = self.read(*removed, copies=2 if paired else 1)
        features = features if embed is None else embed(features)
        present = rearrange(run, "b s n -> (b s) 1 n")
        if paired:
            present = torch.cat((present, ~present), dim=1)
        means = present_means(features, present)
        if paired == "across":
            means = rearrange(means, "(b s) parts d -> (b parts) s d", s=run.shape[1])
            return means[: len(images)]
        return rearrange(means, "(b s) parts d -> b (s parts) d", b=images.shape[0])

    def whole_tokens(self, images: Images) -> tuple[EncodedTokens, TokenSequence, int]:
        """All tokens of the whole image, what entered the blocks, and how many are prefix."""
        sequence = self.embed(images)
        tokens, positions, num_prefix = self._assemble(sequence, [sequence.prefix])
        mask = None
        if num_prefix and self.prefix_tokens == "drop":
            mask = hidden_prefix_mask(num_prefix, sequence.patches.shape[1], tokens.device)
        return self.encode(tokens, positions, mask), sequence, num_prefix

    def removed_tokens(
        self, images: Images, coalitions: RunCoalitions, *, paired: Pairing
    ) -> tuple[EncodedTokens, Part, int]:
        """All tokens of each coalition, [B * S, ...], their part, and how many are prefix.

        Absent patches were removed before block 1; their own tokens, which are there all the same,
        mean nothing unless `paired`, when they form the other part. A prefix that patches can see
        then comes twice, that of the coalition first. With "across", the coalitions are those of
        images 0, 2, ..., and the other part is of the image that follows each.
        """
        if paired == "across":
            sequence, second = self._embed_across(images, coalitions)
        else:
            sequence = self.embed_present(images, coalitions, paired=paired)
            second = sequence.prefix
        present = rearrange(coalitions, "b s n -> (b s) n")
        keep = self.prefix_tokens == "keep"
        prefixes = [sequence.prefix, second] if paired and keep else [sequence.prefix]
        tokens, positions, num_prefix = self._assemble(sequence, prefixes)
        one_copy = sequence.prefix.shape[1] if num_prefix else 0
        build = pair_mask if paired else removal_mask
        mask = build(present, one_copy, keep_prefix=keep)
        prefix = present.new_ones(len(present), one_copy)
        # A second copy of the prefix belongs to the complement.
        parts = [prefix, ~prefix, present] if num_prefix > one_copy else [prefix, present]
        part = torch.cat(parts, dim=1)
        return self.encode(tokens, positions, mask), part, num_prefix

    def _embed_across(
        self, images: Images, coalitions: RunCoalitions
    ) -> tuple[TokenSequence, Tokens]:
        """Tokens in which each image has its present patches, and the next image all others.

        Also the prefix of the next image. The last image has all patches where none follows.
        """
        following = torch.arange(1, len(images) + 1, 2, device=images.device)
        following = following.clamp(max=len(images) - 1)
        sequence = self.embed_present(images[0::2], coalitions, paired=False)
        others = self.embed_present(images[following], ~coalitions, paired=False)
        present = coalitions.flatten(0, 1)[:, :, None]
        patches = torch.where(present, sequence.patches, others.patches)
        return sequence._replace(patches=patches), others.prefix

    def prefix_scores(self, prefix: EncodedTokens) -> Float[Tensor, "items classes"]:
        """Logits of a head that reads the prefix tokens alone: by default the first of them."""
        return self.class_scores(prefix[:, 0])

    def read(
        self, tokens: EncodedTokens, part: Part, num_prefix: int, *, copies: int
    ) -> PatchFeatures:
        """Patch features, each followed by its part's class token where the head reads that."""
        patches = self.weigh(tokens, part, num_prefix)
        if not self.reads_class_token:
            return patches
        class_token = tokens[:, None, 0]
        if copies == 2:
            of_complement = tokens[:, None, num_prefix // 2]
            class_token = torch.where(part[:, num_prefix:, None], class_token, of_complement)
        return torch.cat((patches, class_token.expand_as(patches)), dim=2)

    def _assemble(
        self, sequence: TokenSequence, prefixes: Sequence[Tensor]
    ) -> tuple[Tokens, Positions | None, int]:
        """Sequence for the blocks after these prefixes, its positions and the prefixes' length.

        Where positions give the prefix fixed slots, a dropped prefix keeps them, out of sight of
        the patches.
        """
        positions, copies = sequence.positions, len(prefixes)
        if sequence.prefix.shape[1] == 0:
            copies = 0
        elif self.prefix_tokens == "drop" and not sequence.prefix_has_slots:
            copies = 0
            positions = None if positions is None else positions.with_prefix_copies(0)
        elif positions is not None:
            positions = positions.with_prefix_copies(copies)
        if copies == 0:
            # patch embeddings are transposed views; every later layer would inherit the strides.
            return sequence.patches.contiguous(), positions, 0
        tokens = torch.cat((*prefixes, sequence.patches), dim=1)
        return tokens, positions, copies * sequence.prefix.shape[1]
