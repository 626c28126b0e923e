"""Packed attention equals physically gathered tokens, wherever it is allowed to run."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from shapwrap import shapley_loss
from shapwrap.masking import attention, packing
from shapwrap.masking.packing import PackedMask, pack, packed_mask
from tests.backbones import TOKEN_KINDS, make_case, random_coalitions
from tests.removal_reference import reference_value

HANDED_ON = [
    "vit-class-token",
    "vit-average-norm-registers",
    "vit-average-class-token",
    "vit-average-map-registers",
    "eva-class-token",
    "eva-average",
    "eva-mixed-registers",
]
"""Kinds whose attention is handed the mask as it is."""


def attention_by_segment(query, key, value, packing, scale):
    """What the kernel does, by a mask over all tokens of the batch: slow, on any device."""
    places = torch.arange(len(query), device=query.device)
    segment = torch.bucketize(places, packing.boundaries[1:].long(), right=True)
    heads = (rows.transpose(0, 1) for rows in (query, key, value))
    allowed = segment[:, None] == segment
    return functional.scaled_dot_product_attention(*heads, allowed, scale=scale).transpose(0, 1)


@pytest.fixture
def calls(monkeypatch):
    """Packing on a CPU, by the slow reference; the list grows with every call of it."""
    made = []

    def counted(*arguments):
        made.append(arguments[0].dtype)
        return attention_by_segment(*arguments)

    monkeypatch.setattr(attention, "kernel_runs_on", lambda device: True)
    monkeypatch.setattr(packing, "KERNEL_DTYPES", (torch.float32, torch.float64))
    monkeypatch.setattr(packing, "variable_length_attention", counted)
    return made


@pytest.mark.parametrize(("items", "length", "num_parts"), [(1, 1, 2), (4, 7, 2), (5, 9, 3)])
def test_a_packing_is_the_sorted_tokens(items, length, num_parts):
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        part = torch.randint(num_parts, (items, length), generator=generator)
        part[0] = num_parts - 1
        found = pack(part, num_parts)
        order, boundaries = [], [0]
        for item in range(items):
            for number in range(num_parts):
                order += [item * length + t for t in range(length) if part[item, t] == number]
                boundaries.append(len(order))
        assert found.order.tolist() == order
        assert found.order[found.places].tolist() == list(range(items * length))
        assert found.boundaries.tolist() == boundaries
        assert found.boundaries.dtype == torch.int32
        assert found.longest >= max(b - a for a, b in pairwise(boundaries))


@pytest.mark.parametrize("kind", HANDED_ON)
@torch.no_grad()
def test_packed_is_gathered(kind, calls):
    case = make_case(kind, batch=3)
    coalitions = random_coalitions(case, 4, seed=0, paired=True)
    coalitions[0, 0], coalitions[0, 1] = True, False
    values = case.wrapped.value(case.images, coalitions)
    assert len(calls) >= len(case.wrapped.model.blocks)
    for image, rows, found in zip(case.images, coalitions, values, strict=True):
        expected = torch.stack([reference_value(case, image, row) for row in rows])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in TOKEN_KINDS if kind not in HANDED_ON])
@torch.no_grad()
def test_layers_of_any_other_kind_are_none_the_wiser(kind, calls):
    case = make_case(kind)
    coalitions = random_coalitions(case, 4, seed=0, paired=True)
    packed = case.wrapped.value(case.images, coalitions)
    one_by_one = [case.wrapped.value(case.images, part) for part in coalitions.split(1, dim=1)]
    torch.testing.assert_close(packed, torch.cat(one_by_one, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["vit-class-token", "eva-mixed-registers"])
def test_gradients_are_those_of_the_mask(kind, recompute, calls, monkeypatch):
    case = make_case(kind, dtype=torch.float64)
    case.wrapped.train()
    case.wrapped.set_grad_checkpointing(recompute)
    coalitions = random_coalitions(case, 4, seed=0, paired=True)
    gradients = []
    for packs in (True, False):
        monkeypatch.setattr(attention, "kernel_runs_on", lambda device, packs=packs: packs)
        case.wrapped.zero_grad()
        calls.clear()
        output = case.wrapped(case.images, coalitions, paired=True)
        (shapley_loss(output) + output.logits.square().mean()).backward()
        # Recomputation packs as well.
        assert len(calls) == packs * (1 + recompute) * len(case.wrapped.model.blocks)
        gradients.append([p.grad for p in case.wrapped.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_packs_in_the_precision_of_autocast(calls, monkeypatch):
    monkeypatch.setattr(packing, "KERNEL_DTYPES", (torch.bfloat16,))
    case = make_case("eva-mixed-registers")
    coalitions = random_coalitions(case, 2, seed=0, paired=True)
    case.wrapped(case.images, coalitions, paired=True)
    assert calls == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.wrapped(case.images, coalitions, paired=True).values
    assert set(calls) == {torch.bfloat16}
    monkeypatch.setattr(attention, "kernel_runs_on", lambda device: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masked = case.wrapped(case.images, coalitions, paired=True).values
    torch.testing.assert_close(found, masked, atol=3e-2, rtol=3e-2)


def _masked(items=2, length=5):
    part = torch.arange(items * length).view(items, length) % 2
    mask = (part[:, :, None] == part[:, None, :])[:, None]
    return mask, packed_mask(mask, part, 2)


@pytest.mark.parametrize(
    ("features", "options"),
    [
        (8, {"dropout_p": 0.5}),
        (12, {}),
        (264, {}),
    ],
)
def test_the_mask_serves_what_the_kernel_cannot(features, options, calls):
    mask, packed = _masked()
    query, key, value = torch.randn(3, 2, 3, 5, features)
    results = []
    for one in (mask, packed):
        torch.manual_seed(0)
        results.append(
            functional.scaled_dot_product_attention(query, key, value, attn_mask=one, **options)
        )
    assert torch.equal(*results)
    assert calls == []


def test_keys_of_other_tokens_are_masked(calls):
    mask, packed = _masked()
    query, key = torch.randn(2, 3, 2, 8), torch.randn(2, 3, 5, 8)
    rows = packed[:, :, :2]
    assert type(rows) is torch.Tensor
    found = functional.scaled_dot_product_attention(query, key, key, rows)
    expected = functional.scaled_dot_product_attention(query, key, key, mask[:, :, :2])
    assert torch.equal(found, expected)
    assert calls == []


def test_to_everything_else_it_is_a_plain_mask():
    mask, packed = _masked()
    assert isinstance(packed, PackedMask)
    for plain in (~packed, packed[..., 1:], packed.repeat_interleave(2, -1), packed.float()):
        assert type(plain) is torch.Tensor
    assert torch.equal(torch.where(packed, 1.0, 0.0), mask.float())


def test_no_packing_without_a_kernel():
    assert not packing.kernel_runs_on(torch.device("cpu"))
    present = torch.rand(2, 6) > 0.5
    assert type(attention.pair_mask(present, 0, keep_prefix=False)) is torch.Tensor


def test_an_older_kernel_is_left_alone(monkeypatch):
    """That of torch 2.10 has neither scale nor window."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", lambda q, k, v, ends_q, ends_k, max_q, max_k: q)
    assert not packing._torch_has_it()


def test_the_kernel_is_called_as_torch_has_it():
    """On the meta device the library's own operator checks its arguments."""
    assert packing._torch_has_it()
    part = torch.zeros(2, 6, dtype=torch.long, device="meta")
    rows = torch.zeros(12, 3, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
    attended = packing.variable_length_attention(rows, rows, rows, pack(part, 2), None)
    attended.sum().backward()
    assert attended.shape == rows.shape == rows.grad.shape


COMPILED = """
import torch
from torch._dynamo import lookup_backend
from shapwrap.masking import attention, packing
from tests.backbones import make_case, random_coalitions
from tests.test_packing import attention_by_segment
found_in_graph = []
def backend(graph, inputs):
    found_in_graph.extend(str(node.target) for node in graph.graph.nodes)
    return lookup_backend("aot_eager")(graph, inputs)
packing.variable_length_attention = attention_by_segment
attention.kernel_runs_on = lambda device: True
packing.KERNEL_DTYPES = (torch.float32,)
case = make_case("eva-mixed-registers")
coalitions = random_coalitions(case, 2, 0, paired=True)
gradients = []
for compiled in (False, True):
    run = torch.compile(case.wrapped, fullgraph=True, backend=backend)
    found = (run if compiled else case.wrapped)(case.images, coalitions, paired=True)
    case.wrapped.zero_grad()
    sum(part.square().mean() for part in found).backward()
    gradients.append([p.grad for p in case.wrapped.parameters() if p.requires_grad])
for one, other in zip(*gradients, strict=True):
    torch.testing.assert_close(one, other)
# Of the reference that stands for the kernel.
assert sum("bucketize" in name for name in found_in_graph) == len(case.wrapped.model.blocks)
"""


def test_compiles_without_graph_breaks():
    subprocess.run([sys.executable, "-c", COMPILED], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", HANDED_ON)
def test_on_cuda_it_is_the_mask_up_to_rounding(kind, monkeypatch):
    case = make_case(kind, batch=4)
    case.wrapped.cuda()
    images = case.images.cuda()
    coalitions = random_coalitions(case, 4, seed=0, paired=True).cuda()
    coalitions[0, 0], coalitions[0, 1] = True, False
    assert packing.kernel_runs_on(images.device)
    results = []
    for packs in (True, False):
        monkeypatch.setattr(attention, "kernel_runs_on", lambda device, packs=packs: packs)
        case.wrapped.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = case.wrapped(images, coalitions, paired=True)
        output.values.square().mean().backward()
        gradients = [p.grad.flatten() for p in case.wrapped.parameters() if p.grad is not None]
        results.append((output.values, torch.cat(gradients)))
    for one, other in zip(*results, strict=True):
        assert one.isfinite().all()
        assert (one - other).norm() < 3e-2 * other.norm()
