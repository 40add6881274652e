"""Maps in another memory layout: the same numbers, in fresh memory only where need be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gi_kernels import native
from gi_kernels.layout import reflect_pad, relayout
from gi_kernels.testing import layouts

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: Among them: one channel, part of a vector, more than a block of channels, part of a piece of pixels.
SHAPES = [
    (2, 5, 7, 9),
    (1, 300, 3, 70),
    (3, 16, 8, 8),
    (2, 513, 2, 33),
    (1, 1, 4, 5),
    (2, 32, 1, 1),
    (0, 3, 4, 4),
]
GIVEN = [
    layouts.contiguous,
    layouts.channels_last,
    layouts.sliced,
    layouts.strided,
    layouts.expanded_map,
    layouts.expanded,
]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("arrange", GIVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_copy(way, dtype, shape, arrange, memory_format):
    x = arrange(torch.randn(shape, dtype=dtype))
    found = relayout(x, FORMATS[memory_format])
    assert torch.equal(found, x)
    assert found.dtype == dtype
    assert found.stride() == x.contiguous(memory_format=FORMATS[memory_format]).stride()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_what_has_the_layout_is_not_copied(way, memory_format):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=FORMATS[memory_format])
    assert relayout(x, FORMATS[memory_format]) is x


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("given", FORMATS)
def test_gradients(way, given, to):
    """Twice differentiable; the kernel gives a gradient the layout of its map."""
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=FORMATS[given])
    x.requires_grad_()
    call = lambda x: relayout(x, FORMATS[to]) ** 3  # noqa: E731
    assert torch.autograd.gradcheck(call, x)
    assert torch.autograd.gradgradcheck(call, x)
    (gradient,) = torch.autograd.grad(
        relayout(x, FORMATS[to]), x, torch.randn(5, 2, 3, 4).movedim(0, 3).double()
    )
    assert given == to or native.PROBLEM or gradient.stride() == x.stride()


@pytest.mark.parametrize("arrange", GIVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("shape", "margin"), [((2, 5, 7, 9), 3), ((1, 16, 2, 4), 1), ((0, 3, 4, 4), 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_reflect_pad(way, dtype, shape, margin, arrange):
    x = arrange(torch.randn(shape, dtype=dtype))
    padded = reflect_pad(x, margin)
    assert padded.dtype == dtype
    if padded.numel():
        assert torch.equal(padded, F.pad(x, (margin,) * 4, mode="reflect"))
    assert padded.is_contiguous() or padded.is_contiguous(memory_format=torch.channels_last)


def test_reflect_pad_of_more_than_there_is(way):
    with pytest.raises((ValueError, RuntimeError), match=r"margin|[Pp]adding"):
        reflect_pad(torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last), 4)


def test_compiled():
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    call = torch.compile(lambda x: relayout(x, torch.channels_last) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(x), x * 2)
    assert call(x).is_contiguous(memory_format=torch.channels_last)
