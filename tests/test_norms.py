"""Batch norm with its ReLU against PyTorch's in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import library, nn

from gi_kernels import native
from gi_kernels.norms import batch_norm
from gi_kernels.testing import layouts
from gi_kernels.testing.errors import largest_error, magnitude

#: Among them: one channel, one pixel, part of a vector, more than a block of channels, several pieces.
SHAPES = [
    (2, 5, 7, 9),
    (1, 300, 3, 70),
    (3, 16, 8, 8),
    (2, 513, 2, 33),
    (1, 1, 4, 5),
    (2, 32, 1, 1),
    (1, 3, 1, 600),
    (2, 16, 20, 33),
]
GIVEN = [
    layouts.contiguous,
    layouts.channels_last,
    layouts.sliced,
    layouts.strided,
    layouts.expanded_map,
]
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.fixture
def kernel():
    if native.PROBLEM is not None:
        pytest.skip(native.PROBLEM)


def norm_of(channels, dtype=torch.float32, **options):
    """A norm with parameters and running statistics that are not the initial ones."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(channels, eps=1e-3, **options).to(dtype)
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        if tensor is not None:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return norm


def outcome(call, x, norm, incoming):
    """Value, gradients of input and parameters, running statistics."""
    x = x.detach().requires_grad_()
    norm = copy.deepcopy(norm)
    value = call(x, norm)
    gradients = torch.autograd.grad(value, [x, *norm.parameters()], incoming)
    return value.detach(), *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked


def plain(relu):
    return lambda x, norm: F.relu(norm(x)) if relu else norm(x)


def ours(relu):
    return lambda x, norm: batch_norm(x, norm, relu)


def assert_near(found, exact, allowed, what, scale=None):
    assert found.shape == exact.shape
    error = largest_error(found, exact) / (scale or magnitude(exact))
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"


WHAT = ("value", "gradient of x", "of weight", "of bias", "running mean", "running variance", "batches")


@pytest.mark.parametrize("relu", [False, True], ids=["norm", "relu"])
@pytest.mark.parametrize(
    "incoming", [layouts.contiguous, layouts.channels_last, layouts.expanded], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("arrange", GIVEN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_agrees(kernel, dtype, shape, arrange, incoming, relu):
    torch.manual_seed(0)
    x = arrange((torch.randn(shape, dtype=torch.float64) + 2).to(dtype))
    grad = incoming(torch.randn(shape, dtype=torch.float64).to(dtype))
    norm = norm_of(shape[1], dtype)
    exact = outcome(plain(relu), x.double(), copy.deepcopy(norm).double(), grad.double())
    found = outcome(ours(relu), x, norm, grad)
    assert found[0].dtype == found[1].dtype == dtype
    if arrange in (layouts.contiguous, layouts.channels_last):
        assert found[0].stride() == x.stride()
    theirs = outcome(plain(relu), x, norm, grad)
    # The mean's own rounding grows in proportion to it as the deviation shrinks, as where all numbers of a
    # channel are the same.
    deviation = (x.double().var((0, 2, 3), correction=0) + norm.eps).sqrt()
    condition = 1 + float((x.double().abs().amax((0, 2, 3)) / deviation).max())
    for what, mine, other, wanted in zip(WHAT, found, theirs, exact, strict=True):
        scale = max(magnitude(wanted), 1e-30)
        # What may cancel is judged by its terms.
        if what == "gradient of x":
            scale = max(
                scale, magnitude(grad.double()) * float((norm.weight.detach().double() / deviation).max())
            )
        elif what == "of weight":
            scale = max(scale, float(grad.double().abs().sum((0, 2, 3)).max()))
        if dtype in TOLERANCE:
            allowed = condition * TOLERANCE[dtype]
        else:
            allowed = max(2 * largest_error(other, wanted) / scale, torch.finfo(dtype).eps)
        assert_near(mine, wanted, allowed, what, scale)


@pytest.mark.parametrize("arrange", [layouts.contiguous, layouts.channels_last], ids=lambda f: f.__name__)
def test_no_digits_are_lost_in_large_maps(kernel, arrange):
    """The mean is a thousand deviations from zero, and there are half a million numbers."""
    torch.manual_seed(0)
    x = arrange(torch.randn(2, 16, 512, 512) + 1000)
    norm = norm_of(16)
    exact = outcome(plain(False), x.double(), copy.deepcopy(norm).double(), x.double() - 1000)
    found = outcome(ours(False), x, norm, x - 1000)
    for what, mine, wanted in zip(WHAT, found, exact, strict=True):
        # A gradient that is all regression on the deviation leaves next to nothing of its terms.
        terms = magnitude(x.double() - 1000) if what == "gradient of x" else None
        assert_near(mine, wanted, 1e-4, what, terms)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_options(way, options):
    norm = norm_of(3, **options)
    theirs = copy.deepcopy(norm)
    for i in range(3):
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(i))
        assert torch.allclose(batch_norm(x, norm, relu=True), F.relu(theirs(x)), atol=1e-6)
    for (name, mine), other in zip(norm.named_buffers(), theirs.buffers(), strict=True):
        assert torch.allclose(mine, other), name


def test_other_modules_are_called(way):
    x = torch.randn(2, 3, 4, 5)
    norm = norm_of(3).eval()
    assert torch.equal(batch_norm(x, norm), norm(x))
    assert torch.equal(batch_norm(x, norm, relu=True), F.relu(norm(x)))
    assert torch.equal(batch_norm(x, nn.InstanceNorm2d(3)), nn.InstanceNorm2d(3)(x))
    kept = x.clone()
    assert torch.equal(batch_norm(x, nn.Sequential(), relu=False), kept)


def test_autocast(way):
    """Maps in low precision, parameters in float32."""
    norm = norm_of(8)
    x = torch.randn(2, 8, 6, 7, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = batch_norm(x, norm, relu=True)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.float32


def test_nan_stays(way):
    x = torch.randn(2, 3, 4, 5)
    x[0, 1, 2, 3] = torch.nan
    y = batch_norm(x, norm_of(3), relu=True)
    assert y[:, 1].isnan().all() and not y[:, [0, 2]].isnan().any()


def test_too_few(way):
    with pytest.raises(ValueError, match="more than"):
        batch_norm(torch.randn(1, 3, 1, 1), norm_of(3))


def test_only_the_input_is_kept(kernel):
    norm = norm_of(3)
    x = torch.randn(2, 3, 40, 50, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        batch_norm(x * 1, norm, relu=True)
    assert sum(t.numel() for t in kept if t.dim() == 4) == x.numel()


def test_every_number_is_written(kernel, monkeypatch):
    """Fresh memory is full of NaN here."""
    x = torch.randn(2, 17, 9, 31)
    torch.use_deterministic_algorithms(True)
    try:
        found = outcome(ours(True), x, norm_of(17), torch.ones_like(x))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(t.isnan().any() for t in found)


def test_threads_do_not_change_the_result(kernel):
    x, threads = torch.randn(3, 20, 30, 31), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(outcome(ours(True), x, norm_of(20), x.flip(0)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("relu", [False, True], ids=["norm", "relu"])
def test_gradients(kernel, relu):
    norm = norm_of(3, torch.float64, track_running_stats=False)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    call = lambda x, *_: batch_norm(x, norm, relu)  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *norm.parameters()))


def test_second_gradient_is_refused(kernel):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(batch_norm(x, norm_of(3)).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no derivative"):
        grad.sum().backward()


def test_compiled(kernel):
    torch._dynamo.reset()
    norm, x = norm_of(3), torch.randn(2, 3, 4, 5)
    compiled = torch.compile(lambda x, n: batch_norm(x, n, True) * 2, fullgraph=True, backend="aot_eager")
    found = outcome(compiled, x, norm, torch.ones_like(x))
    expected = outcome(lambda x, n: batch_norm(x, n, True) * 2, x, norm, torch.ones_like(x))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("arrange", [layouts.contiguous, layouts.channels_last], ids=lambda f: f.__name__)
def test_operator_checks(kernel, arrange, relu):
    x = arrange(torch.randn(2, 16, 4, 5)).requires_grad_()
    weight, bias = (p.detach().requires_grad_() for p in norm_of(16).parameters())
    library.opcheck(torch.ops.gi.batch_norm, (x, weight, bias, 1e-5, relu))
