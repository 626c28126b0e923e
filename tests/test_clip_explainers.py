"""Methods for image-text models: zero-shot classifiers, and formulas in NumPy, image by image."""

import copy
import functools
import math

import numpy as np
import pytest
import torch
from timm.models.eva import Eva
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

from shapwrap import ShapleyWrapper
from shapwrap.clip import ZeroShotClassifier
from shapwrap.errors import (
    ArgumentError,
    BackboneTypeError,
    MissingDependencyError,
    ShapwrapError,
    TargetError,
    UnsupportedBackboneError,
)
from shapwrap.explainers import (
    ECLIP,
    GAME,
    M2IB,
    RISE,
    AttCAT,
    AttentionGradCAM,
    AttentionRollout,
    CheferLRP,
    CLIPGradCAM,
    CLIPSurgery,
    GradCAM,
    InputXGradient,
    IntegratedGradients,
    KernelSHAP,
    MaskCLIP,
    Occlusion,
    RandomMap,
)
from shapwrap.explainers.attention_intervention import AttentionIntervention

open_clip = pytest.importorskip("open_clip")

from tests import clip_reference as slow  # noqa: E402
from tests.clip_models import clip_model, tokenizer, tokens  # noqa: E402
from tests.explained_models import EVIDENCE, Fuse, reader  # noqa: E402
from tests.towers import EMBEDDING, around, vit  # noqa: E402

NAMES = ["a dog", "a cat", "grass"]


def eva02():
    """Rotary positions, SwiGLU, norms within attention and MLP, as the tower of EVA02-CLIP."""
    trunk = Eva(
        img_size=(8, 12),
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        mlp_ratio=2,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(2, 3),
        global_pool="token",
        num_classes=EMBEDDING,
    )
    return shaken(around(trunk, (8, 12)))


def shaken(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.2 if parameter.ndim < 2 else 0.1))
    return module.eval()


def fresh(kind, *, dtype=torch.float64, texts=3, **options):
    """A classifier of three texts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = clip_model("vit-token" if kind == "eva02" else kind, **options)
        if kind == "eva02":
            model.visual = eva02()
        return ZeroShotClassifier(model.to(dtype), NAMES[:texts], tokenizer=tokenizer)


shared = functools.cache(fresh)


def make(kind, *, batch=2, dtype=torch.float64, **options):
    """A classifier that is to be left as it is, and images."""
    classifier = shared(kind, dtype=dtype, **options)
    return classifier, images_for(classifier, batch).to(dtype)


def images_for(classifier, batch=2):
    size = np.broadcast_to(classifier.tower.image_size, 2).tolist()
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=generator, dtype=torch.float64)


KNOWN = {}


def bound(method, classifier, **options):
    """The method; what is known of a model of `make` is found once for all methods."""
    made = method(classifier, **options)
    made.model = KNOWN.setdefault(classifier, made.model)
    return made


def parts_of(classifier):
    tower = classifier.tower
    return slow.EvaParts(tower) if hasattr(tower, "trunk") else slow.OpenClipParts(tower)


def scale_of(classifier):
    return float(classifier.model.logit_scale.detach().exp())


def close(values, expected, rtol=1e-6):
    bound = np.abs(expected).max()
    assert bound > 1e-6
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=rtol * bound)


CLIP_METHODS = {
    "grad-cam (clip)": CLIPGradCAM,
    "eclip": ECLIP,
    "eclip (wo-ksim)": lambda model, **o: ECLIP(model, key_similarity=False, **o),
    "maskclip": MaskCLIP,
    "maskclip (wo-ksim)": lambda model, **o: MaskCLIP(model, key_similarity=False, **o),
    "clip surgery": CLIPSurgery,
    "clip surgery (empty prompt)": lambda model, **o: CLIPSurgery(
        model, redundancy="empty prompt", **o
    ),
    "m2ib": lambda model, **o: M2IB(model, steps=3, samples=2, **o),
}
every_method = pytest.mark.parametrize("name", CLIP_METHODS)
TRANSFORMERS = ["vit-token", "vit-average", "eva02"]


# --- the classifier ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize("kind", ["vit-token", "resnet", "coca", "eva02"])
@torch.no_grad()
def test_logits_are_those_of_the_model(kind, bias):
    classifier, images = make(kind, bias=bias, dtype=torch.float32)
    model = classifier.model
    embedding = model.visual(images)
    embedding = embedding[0] if isinstance(embedding, tuple) else embedding
    texts = model.encode_text(tokenizer(NAMES), normalize=True)
    expected = functional.normalize(embedding, dim=-1) @ texts.T * model.logit_scale.exp()
    expected = expected if bias is None else expected + bias
    torch.testing.assert_close(classifier(images), expected)
    torch.testing.assert_close(classifier.text_embeddings, texts)
    assert classifier.class_names == NAMES
    given = ZeroShotClassifier(model, texts * 7, class_names="xyz")
    torch.testing.assert_close(given(images), expected)
    assert given.class_names == ["x", "y", "z"]
    ids = ZeroShotClassifier(model, tokenizer(NAMES))
    torch.testing.assert_close(ids(images), expected)
    assert ids.class_names is None
    explanation = RandomMap(classifier)(images, 2)
    torch.testing.assert_close(explanation.logits, expected)
    assert explanation.class_names == NAMES


def test_the_classifier_shares_the_model():
    model = clip_model().train()
    before = [name for name, _ in model.named_parameters()]
    classifier = ZeroShotClassifier(model, tokens(3))
    assert [f"model.{name}" for name in before] == [n for n, _ in classifier.named_parameters()]
    assert next(classifier.parameters()) is next(model.parameters())
    assert all(module.training for module in classifier.modules())
    assert not classifier.text_embeddings.requires_grad
    assert "text_embeddings" in classifier.state_dict()


def test_what_is_no_zero_shot_classifier():
    model = clip_model()
    with pytest.raises(BackboneTypeError, match="encode_text"):
        ZeroShotClassifier(nn.Linear(2, 2), ["a"])
    with pytest.raises(BackboneTypeError, match=r"classifier\(texts\)"):
        ZeroShotClassifier(ShapleyWrapper(model), tokens(3))
    with pytest.raises(ArgumentError, match="tokenizer=open_clip"):
        ZeroShotClassifier(model, NAMES)
    with pytest.raises(ArgumentError, match="no text"):
        ZeroShotClassifier(model, [], tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="2 class names for 3 texts"):
        ZeroShotClassifier(model, tokens(3), class_names=["a", "b"])
    narrow = ZeroShotClassifier(model, torch.randn(3, 7))
    with pytest.raises(ArgumentError, match="width 7; images have 20"):
        narrow(torch.randn(1, 3, 12, 16))
    classifier, images = make("vit-token")
    with pytest.raises(TargetError, match="target"):
        ECLIP(classifier)(images, 3)


# --- methods for any model --------------------------------------------------------------------


def same_as_a_function(method, kind, **options):
    """The method on the classifier, and on a function of the model's towers, grid given."""
    classifier, images = make(kind)
    model = classifier.model
    texts = model.encode_text(tokenizer(NAMES), normalize=True).detach()

    def logits(x):
        embedding = model.visual(x)
        embedding = embedding[0] if isinstance(embedding, tuple) else embedding
        return functional.normalize(embedding, dim=-1) @ texts.T * model.logit_scale.exp()

    target = torch.tensor([1, 0])
    made = bound(method, classifier, **options)(images, target)
    function = method(logits, grid=made.grid, **options)
    torch.testing.assert_close(made.values, function(images, target).values)
    # A sum that is negative throughout is cut off at zero.
    assert made.values.abs().max() > 0 or method is AttentionGradCAM
    return made


@pytest.mark.parametrize("method", [AttentionRollout, GAME, AttentionGradCAM, AttCAT, CheferLRP])
@pytest.mark.parametrize("kind", ["vit-token", "coca", "eva02"])
def test_methods_for_transformers(method, kind):
    same_as_a_function(method, kind)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (InputXGradient, {}),
        (IntegratedGradients, {"n_steps": 4}),
        (Occlusion, {}),
        (RISE, {"num_masks": 8, "cells": (2, 2)}),
        (KernelSHAP, {"num_coalitions": 32}),
        (RandomMap, {}),
    ],
)
@pytest.mark.parametrize("kind", ["vit-token", "resnet"])
def test_methods_for_any_model(method, options, kind):
    if method in (InputXGradient, IntegratedGradients):
        pytest.importorskip("captum", exc_type=(ImportError, MissingDependencyError))
    made = same_as_a_function(method, kind, **options)
    assert made.grid == ((2, 2) if kind == "resnet" else (3, 4))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vit-token", "grad-cam (tokens)"),
        ("resnet", "grad-cam"),
        ("timm-convnext-linear", "grad-cam"),
        ("coca-average", "grad-cam"),
    ],
)
def test_grad_cam_finds_its_layer(kind, name):
    classifier, images = make(kind)
    found = GradCAM(classifier)(images, 1)
    assert found.method == name
    assert found.values.max() > 0
    if kind == "resnet":
        layer = GradCAM(classifier, layer=classifier.tower.layer4)(images, 1)
        torch.testing.assert_close(found.values, layer.values)


def rollout_of_last(attention):
    mixed = attention.mean(axis=0) + np.eye(attention.shape[1])
    return mixed[0] / mixed[0].sum()


def test_rollout_and_game_of_the_last_block():
    classifier, images = make("vit-token")
    parts = parts_of(classifier)
    text = classifier.text_embeddings[1].numpy()
    rollout = bound(AttentionRollout, classifier, blocks="last")(images, 1)
    game = bound(GAME, classifier, blocks="last")(images, 1)
    assert (rollout.method, game.method) == ("attention rollout (last block)", "game (last block)")
    for image, row, other in zip(images.numpy(), rollout.values, game.values, strict=True):
        run = slow.Run(parts, image)
        q, k, v = run.queries[-1], run.keys[-1], run.values[-1]
        attention = slow.softmax(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        close(row, rollout_of_last(attention)[1:])

        def logit(a, run=run, v=v):
            after = run.after(1, run.inputs[-2], slow.merged(a @ v))
            return scale_of(classifier) * parts.image(after) @ text

        relevance = np.maximum(attention * slow.differences(logit, attention), 0).mean(axis=0)
        close(other, relevance[0, 1:], 1e-5)
    with pytest.raises(ArgumentError, match="'none'"):
        GAME(classifier, blocks="none")
    with pytest.raises(ArgumentError, match="'none'"):
        AttentionRollout(classifier, blocks="none")
    with pytest.raises(ArgumentError, match="one of the two"):
        AttentionRollout(classifier, blocks="last", start_layer=1)


# --- formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_clip_grad_cam_is_its_formula(kind):
    classifier, images = make(kind)
    values = bound(CLIPGradCAM, classifier)(images, torch.tensor([2, 1])).values
    for image, target, row in zip(images.numpy(), (2, 1), values, strict=True):
        text = classifier.text_embeddings[target].numpy()
        close(row, slow.clip_grad_cam(parts_of(classifier), image, text, scale_of(classifier)))


@pytest.mark.parametrize("key_similarity", [True, False])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_eclip_is_its_formula(kind, key_similarity):
    classifier, images = make(kind)
    found = bound(ECLIP, classifier, key_similarity=key_similarity)(images, torch.tensor([2, 1]))
    for image, target, row in zip(images.numpy(), (2, 1), found.values, strict=True):
        text = classifier.text_embeddings[target].numpy()
        scale = scale_of(classifier)
        close(row, slow.eclip(parts_of(classifier), image, text, scale, key_similarity))
    assert torch.isnan(found.total).all()


@pytest.mark.parametrize("key_similarity", [True, False])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_mask_clip_is_its_formula(kind, key_similarity):
    classifier, images = make(kind)
    found = bound(MaskCLIP, classifier, key_similarity=key_similarity)(images, torch.tensor([2, 1]))
    for image, target, row in zip(images.numpy(), (2, 1), found.values, strict=True):
        text = classifier.text_embeddings[target].numpy()
        close(row, slow.mask_clip(parts_of(classifier), image, text, key_similarity))


@pytest.mark.parametrize("blocks", [1, 6])
@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_clip_surgery_is_its_formula(kind, blocks):
    classifier, images = make(kind)
    texts = classifier.text_embeddings.numpy()
    empty = classifier.encode_texts("")[0].numpy()
    target = torch.tensor([2, 1])
    listed = bound(CLIPSurgery, classifier, blocks=blocks)(images, target).values
    options = {"redundancy": "empty prompt", "blocks": blocks}
    prompted = bound(CLIPSurgery, classifier, **options)(images, target).values
    given = bound(CLIPSurgery, classifier, empty=torch.from_numpy(empty)[None] * 3, **options)
    torch.testing.assert_close(given(images, target).values, prompted)
    for row, (image, c) in enumerate(zip(images.numpy(), (2, 1), strict=True)):
        embedding, patches = slow.surgery_features(parts_of(classifier), image, blocks)
        close(listed[row], slow.less_redundant(embedding, patches, texts, c))
        close(prompted[row], np.array([f @ (texts[c] - empty) for f in patches]))


def m2ib_by_loop(classifier, image, target, layer, noise, beta=0.1, rate=1.0):
    """Block by block, sample by sample, with Adam written out."""
    tower, text = classifier.tower, classifier.text_embeddings[target]
    if hasattr(tower, "trunk"):
        trunk = tower.trunk
        tokens, rope = trunk._pos_embed(trunk.patch_embed(image[None]))
        tokens = trunk.norm_pre(tokens)
        blocks = [lambda x, b=block: b(x, rope=rope) for block in trunk.blocks]

        def embed(x):
            return tower.head(trunk.head(trunk.fc_norm(trunk.norm(x)[:, 0])))[0]

    else:
        tokens, blocks = tower._embeds(image[None]), list(tower.transformer.resblocks)

        def embed(x):
            return (tower.ln_post(x)[:, 0] @ tower.proj)[0]

    with torch.no_grad():
        for block in blocks[: layer + 1]:
            tokens = block(tokens)
    x = tokens[0]
    alpha = torch.full_like(x, 5.0, requires_grad=True)
    first, second = torch.zeros_like(x), torch.zeros_like(x)

    def information():
        lam = torch.sigmoid(alpha)
        variance = (1 - lam) ** 2
        return -0.5 * (1 + torch.log(variance) - (lam * x) ** 2 - variance)

    for step, drawn in enumerate(noise, start=1):
        similarity = 0
        for eps in drawn:
            lam = torch.sigmoid(alpha)
            mixed = (lam * x + (1 - lam) * eps)[None]
            for block in blocks[layer + 1 :]:
                mixed = block(mixed)
            similarity = similarity + functional.cosine_similarity(embed(mixed), text, dim=0)
        loss = beta * information().mean() - similarity / len(drawn)
        (gradient,) = torch.autograd.grad(loss, alpha)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        moved = (first / (1 - 0.9**step)) / (torch.sqrt(second / (1 - 0.999**step)) + 1e-8)
        alpha = (alpha - rate * moved).detach().requires_grad_()
    return torch.nansum(information(), dim=1).detach()[1:].numpy()


@pytest.mark.parametrize(("kind", "layer"), [("vit-token", 0), ("eva02", 1)])
def test_m2ib_is_its_formula(kind, layer):
    classifier, images = make(kind)
    generator = torch.Generator().manual_seed(7)
    seed = int(torch.randint(2**62, (), generator=copy_of(generator)))
    found = bound(M2IB, classifier, layer=layer, steps=4, samples=3, generator=generator)
    values = found(images, torch.tensor([2, 1])).values
    assert values.min() >= 0
    noise = torch.Generator().manual_seed(seed)
    width = 24
    tokens = 1 + values.shape[1]
    drawn = [torch.randn(3, tokens, width, generator=noise, dtype=torch.float64) for _ in range(4)]
    for image, target, row in zip(images, (2, 1), values, strict=True):
        close(row, m2ib_by_loop(classifier, image, target, layer, drawn))
    torch.testing.assert_close(found(images, torch.tensor([2, 1])).values, values)


def copy_of(generator):
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def test_m2ib_lies_after_block_nine_of_twelve():
    model = clip_model()
    model.visual = shaken(vit())
    model.visual.transformer.resblocks.extend(
        block for _ in range(5) for block in shaken(vit()).transformer.resblocks
    )
    classifier = ZeroShotClassifier(model, tokens(2))
    images = images_for(classifier, 1).float()
    expected = M2IB(classifier, layer=9, samples=1, steps=1)(images, 1).values
    torch.testing.assert_close(M2IB(classifier, samples=1, steps=1)(images, 1).values, expected)


def pooled_map(classifier, image):
    """Tokens that enter the attention pooling of CLIP's ResNet, and its projections."""
    tower, pool = classifier.tower, classifier.tower.attnpool
    with torch.no_grad():
        x = tower.stem(image[None])
        for level in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
            x = level(x)
    patches = x[0].flatten(1).T.numpy()
    tokens = np.concatenate((patches.mean(axis=0, keepdims=True), patches))
    tokens = tokens + slow.numbers(pool.positional_embedding)

    def through(layer, x):
        return x @ slow.numbers(layer.weight).T + slow.numbers(layer.bias)

    q, k, v = (through(layer, tokens) for layer in (pool.q_proj, pool.k_proj, pool.v_proj))
    return q, k, v, lambda x: through(pool.c_proj, x)


def test_on_the_pooling_of_clips_resnet():
    classifier, images = make("resnet")
    texts = classifier.text_embeddings.numpy()
    target = torch.tensor([2, 1])
    values = {
        name: bound(CLIP_METHODS[name], classifier)(images, target).values
        for name in ("eclip", "maskclip", "clip surgery", "clip surgery (empty prompt)")
    }
    heads = classifier.tower.attnpool.num_heads
    empty = classifier.encode_texts("")[0].numpy()
    for row, (image, c) in enumerate(zip(images, (2, 1), strict=True)):
        q, k, v, project = pooled_map(classifier, image)
        output = slow.softmax(q @ k.T / math.sqrt(q.shape[1])) @ v

        def logit(o, c=c, project=project):
            return scale_of(classifier) * slow.unit(project(o[0])) @ texts[c]

        gradient = slow.differences(logit, output)
        near = slow.unit(project(q)), slow.unit(project(k))
        close(values["eclip"][row], slow.weighted_values(gradient, v, *near, 1, True))
        embedded = slow.unit(project(v))
        masked = [(embedded[i] @ texts[c]) * (near[1][0] @ near[1][i]) for i in range(1, len(v))]
        close(values["maskclip"][row], np.array(masked))
        outputs = []
        for part in np.split(v, heads, axis=1):
            direction = slow.unit(part)
            scores = 8 / math.sqrt(part.shape[1]) * direction @ direction.T
            outputs.append(slow.softmax(scores) @ part)
        patches = slow.unit(project(np.concatenate(outputs, axis=1)))[1:]
        with torch.no_grad():
            image_embedding = classifier.image_embeddings(image[None])[0].numpy()
        listed = slow.less_redundant(image_embedding, patches, texts, c)
        close(values["clip surgery"][row], listed)
        expected = np.array([f @ (texts[c] - empty) for f in patches])
        close(values["clip surgery (empty prompt)"][row], expected)


# --- known evidence ---------------------------------------------------------------------------


def reading():
    """The class token carries two patches' brightness to the first text; nothing else can."""
    trunk = reader("vit")
    with torch.no_grad():
        trunk.head.bias[2] = 1
    model = clip_model()
    model.visual = around(trunk, (8, 12))
    model.visual.head = nn.Sequential()
    texts = torch.eye(5)[[1, 3, 4]]
    return ZeroShotClassifier(model.eval(), texts)


@pytest.mark.parametrize(
    "method",
    [
        CLIPGradCAM,
        ECLIP,
        lambda model: ECLIP(model, key_similarity=False),
        lambda model: MaskCLIP(model, key_similarity=False),
        CLIPSurgery,
        M2IB,
    ],
)
def test_known_evidence(method):
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(2)) + 0.5
    values = method(reading())(images, 0).values
    for row in values:
        assert sorted(row.topk(2).indices.tolist()) == list(EVIDENCE)


# --- batches, sizes, precision ----------------------------------------------------------------


@every_method
@pytest.mark.parametrize("kind", ["vit-token", "eva02"])
def test_batched_is_looped(name, kind):
    classifier, images = make(kind, batch=5)
    target = torch.tensor([0, 1, 2, 0, 1])
    method = bound(CLIP_METHODS[name], classifier)
    together = method(images, target)
    assert together.values.shape == (5, together.grid[0] * together.grid[1])
    assert together.method == name
    assert torch.isnan(together.total).all()
    chunked = bound(CLIP_METHODS[name], classifier, chunk_size=4)(images, target).values
    alone = [method(image[None], int(c)).values for image, c in zip(images, target, strict=True)]
    torch.testing.assert_close(chunked, together.values)
    torch.testing.assert_close(torch.cat(alone), together.values)
    torch.testing.assert_close(together.logits, classifier(images))


@functools.cache
def tokens_before_images():
    """The same tower, [T, B, D] inside."""
    other = fresh("vit-token")
    tower = vit()
    tower.transformer.batch_first = False
    for block in tower.transformer.resblocks:
        block.attn.batch_first = False
    tower.load_state_dict(other.tower.state_dict())
    other.model.visual = tower.double().eval()
    return other


@every_method
@pytest.mark.parametrize("batch", [3, 6, 13])
def test_as_many_images_as_tokens(name, batch):
    """The axis of the images is found where both are equally long, copies included."""
    classifier, images = make("vit-token", batch=batch)
    values = bound(CLIP_METHODS[name], classifier, chunk_size=26)(images, 1).values
    other = bound(CLIP_METHODS[name], tokens_before_images(), chunk_size=26)(images, 1).values
    single = bound(CLIP_METHODS[name], classifier)(images[-1:], 1).values
    torch.testing.assert_close(other, values)
    torch.testing.assert_close(values[-1:], single)


def test_precision():
    classifier, images = make("vit-token", dtype=torch.float32)
    half = fresh("vit-token").to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Its parts are found within, too.
        CLIPSurgery(fresh("vit-token", dtype=torch.float32))(images, 1)
    for method in CLIP_METHODS.values():
        explainer = bound(method, classifier)
        expected = explainer(images, 1).values
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = explainer(images, 1).values
        lower = bound(method, half)(images.bfloat16(), 1).values
        for each in (expected, mixed, lower):
            assert each.dtype == torch.float32
            both = torch.stack((each.flatten(), expected.flatten()))
            assert torch.corrcoef(both)[0, 1] > 0.9


def test_callers_without_gradients():
    classifier = fresh("eva02")
    images = images_for(classifier)
    explainers = [bound(method, classifier) for method in CLIP_METHODS.values()]
    expected = [explainer(images, 1).values for explainer in explainers]
    classifier.requires_grad_(False)
    for context in (torch.no_grad, torch.inference_mode):
        for explainer, values in zip(explainers, expected, strict=True):
            with context():
                found = explainer(images.clone(), 1).values
            torch.testing.assert_close(found, values)


def test_attention_written_by_hand():
    """Queries, keys and scores are found where no fused function is called."""
    classifier, images = make("eva02")
    other = fresh("eva02")
    for block in other.tower.trunk.blocks:
        block.attn.fused_attn = False
    for method in CLIP_METHODS.values():
        values = bound(method, classifier)(images, 1).values
        torch.testing.assert_close(bound(method, other)(images, 1).values, values)


@pytest.mark.parametrize(
    "by_hand",
    [
        lambda q, k, d: (q / d**0.5) @ k.transpose(-2, -1),
        lambda q, k, d: q @ k.transpose(-2, -1) / d**0.5,
        lambda q, k, d: d**-0.5 * (q @ k.mT),
        lambda q, k, d: ((q @ k.mT) * d**-0.5 + 0.0).float(),
        lambda q, k, d: torch.mul(torch.matmul(q * 3, k.mT), d**-0.5 / 3).masked_fill(
            torch.zeros(5, 5, dtype=torch.bool), -1.0
        ),
    ],
)
def test_queries_are_seen_unscaled(by_hand):
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    seen = []

    def rule(index, attended):
        seen.append((index, attended))
        return attended.output * 2

    with AttentionIntervention(attention=rule):
        expected = functional.scaled_dot_product_attention(q, k, v)
        output = by_hand(q, k, 4).softmax(dim=-1) @ v
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(output, 2 * functional.scaled_dot_product_attention(q, k, v))
    (_, fused), (index, found) = seen
    assert index == 1
    for name in ("weights", "values", "scores", "key"):
        torch.testing.assert_close(getattr(found, name), getattr(fused, name))
    torch.testing.assert_close(found.query, q)
    torch.testing.assert_close(fused.query, q)


@pytest.mark.parametrize(
    "kind",
    [
        "vit-token-dropout",
        "vit-token-custom-blocks",
        "vit-token-late-norm",
        "vit-average-late-norm",
        "timm-vit-token-linear",
    ],
)
def test_other_transformers(kind):
    classifier, images = make(kind, batch=1)
    for method in CLIP_METHODS.values():
        explanation = bound(method, classifier)(images, 1)
        assert explanation.values.shape == (1, explanation.grid[0] * explanation.grid[1])
        assert explanation.values.abs().max() > 0 or method is CLIPGradCAM


# --- nothing is left behind -------------------------------------------------------------------


def state_of(model):
    modules = dict(model.named_modules())
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules.values()]
    wants = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    modes = [m.training for m in modules.values()]
    flags = [getattr(m, "fused_attn", None) for m in modules.values()]
    switches = torch.is_grad_enabled(), len(_get_current_function_mode_stack())
    return list(modules), hooks, wants, modes, flags, switches, torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", ["vit-token", "eva02"])
def test_the_model_is_as_it_was(kind):
    classifier = fresh(kind).train()
    images = images_for(classifier)
    next(iter(classifier.tower.children())).eval()
    next(classifier.parameters()).requires_grad_(False)
    before, weights = state_of(classifier), copy.deepcopy(classifier.state_dict())
    given = images.clone()
    for method in CLIP_METHODS.values():
        bound(method, classifier)(images, 1)
        assert state_of(classifier) == before
    assert all(torch.equal(weights[key], value) for key, value in classifier.state_dict().items())
    assert torch.equal(images, given) and not images.requires_grad


def test_also_where_the_model_fails():
    classifier = fresh("vit-token")
    images, fuse = images_for(classifier), Fuse()
    block = classifier.tower.transformer.resblocks[-1]
    block.mlp = nn.Sequential(block.mlp, fuse)
    for method in CLIP_METHODS.values():
        explainer = bound(method, classifier)
        expected, before = explainer(images, 1).values, state_of(classifier)
        # The first call finds the logits.
        fuse.calls_left = 1
        with pytest.raises(RuntimeError, match="the model failed"):
            explainer(images, 1)
        assert state_of(classifier) == before
        fuse.calls_left = None
        torch.testing.assert_close(explainer(images, 1).values, expected)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("timm-swin", "eclip", "windows"),
        ("timm-convnext-linear", "eclip", "no attention among tokens"),
        ("timm-convnext-linear", "maskclip", "no attention among tokens"),
        ("resnet", "m2ib", "pools a feature map"),
        ("resnet", "grad-cam (clip)", "added to its tokens"),
        ("coca", "maskclip", "no embedding in the space of texts"),
        ("coca-average", "clip surgery", "no embedding in the space of texts"),
        ("timm-vit-map-none", "maskclip", "no embedding in the space of texts"),
        ("timm-eva-map", "clip surgery", "no embedding in the space of texts"),
    ],
)
def test_towers_that_a_method_does_not_fit(kind, name, message):
    classifier, images = make(kind, dtype=torch.float32)
    with pytest.raises(UnsupportedBackboneError, match=message):
        bound(CLIP_METHODS[name], classifier)(images, 1)


@pytest.mark.parametrize("kind", ["coca", "coca-average", "timm-vit-map-none", "timm-eva-map"])
@pytest.mark.parametrize("name", ["eclip", "grad-cam (clip)", "m2ib"])
def test_attention_pooling(kind, name):
    """What needs no embeddings of patches works there too."""
    classifier, images = make(kind)
    values = bound(CLIP_METHODS[name], classifier)(images, 1).values
    assert values.abs().max() > 0


@pytest.mark.parametrize("method", [MaskCLIP, CLIPSurgery, M2IB])
def test_other_models_are_refused(method):
    with pytest.raises(BackboneTypeError, match=r"ZeroShotClassifier\(model, texts\)"):
        method(reader("vit"))


def test_eclip_and_grad_cam_take_classifiers_too():
    images = torch.rand(2, 3, 8, 12) + 0.5
    for method in (ECLIP, CLIPGradCAM):
        values = method(reader("vit"))(images, 1).values
        assert sorted(values[0].topk(2).indices.tolist()) == list(EVIDENCE)


def test_options_outside_their_range():
    classifier, images = make("vit-token")
    one, _ = make("vit-token", texts=1)
    with pytest.raises(ArgumentError, match="redundancy is 'none'"):
        CLIPSurgery(classifier, redundancy="none")
    with pytest.raises(ArgumentError, match="one text"):
        CLIPSurgery(one)
    with pytest.raises(ArgumentError, match="expected one"):
        CLIPSurgery(one, redundancy="empty prompt", empty=["a", "b"])
    with pytest.raises(ArgumentError, match="blocks"):
        CLIPSurgery(classifier, blocks=0)
    with pytest.raises(ArgumentError, match="layer is 2, and the tower has 2 blocks"):
        M2IB(classifier, layer=2)(images, 0)
    for options in ({"layer": -1}, {"steps": 0}, {"samples": 0}, {"beta": -1.0}):
        with pytest.raises(ArgumentError):
            M2IB(classifier, **options)
    with pytest.raises(ArgumentError, match="learning_rate"):
        M2IB(classifier, learning_rate=0.0)
    with pytest.raises(ArgumentError, match=r"\(4, 3\).*form \(3, 4\)"):
        ECLIP(classifier, grid=(4, 3))(images)
    with pytest.raises(ShapwrapError, match="finite"):
        ECLIP(classifier)(images * float("nan"))
    assert CLIPSurgery(one, redundancy="empty prompt")(images).values.shape == (2, 12)
