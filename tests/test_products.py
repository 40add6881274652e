"""The layers' products against PyTorch's, whichever way they take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gi_kernels import products
from gi_kernels.layout import is_channels_last

#: x, outputs, groups.
LINEAR = [
    ((3, 5, 7), 4, 1),
    ((1, 1), 1, 1),
    ((2, 9, 12), 6, 3),
    ((7, 33), 65, 1),
    ((2, 3, 4, 8), 16, 8),
    ((0, 4), 3, 1),
    ((2, 0, 4), 6, 2),
]
MAPS = [(2, 5, 3, 4), (1, 7, 1, 1), (3, 1, 2, 5), (0, 4, 2, 2), (1, 16, 9, 7)]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.03, torch.float16: 0.003}


@pytest.fixture(params=["convolution", "product"])
def way(request, monkeypatch):
    """Small products as well by the way of large ones."""
    if request.param == "convolution":
        monkeypatch.setattr(products, "_LEAST", 1e-9)


def gradients(call, tensors, seed=1):
    """Value and gradients of a call."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    value = call(*tensors)
    incoming = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    return value.detach(), *torch.autograd.grad(value, tensors, incoming)


def assert_close(found, expected, tolerance):
    for got, wanted in zip(found, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == wanted.dtype
        assert torch.allclose(got.double(), wanted.double(), rtol=tolerance, atol=10 * tolerance)


def grouped(x, weight, bias, groups):
    """Each group by ``F.linear``."""
    parts = zip(x.chunk(groups, -1), weight.chunk(groups), bias.chunk(groups), strict=True)
    return torch.cat([F.linear(*part) for part in parts], dim=-1)


def operands(shape, outputs, channels, dtype):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in (shape, (outputs, channels), (outputs,))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape, outputs, groups", LINEAR, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
def test_linear(way, shape, outputs, groups, transposed, dtype):
    x, weight, bias = operands(shape, outputs, shape[-1] // groups, dtype)
    if transposed:
        x, weight = x.transpose(0, -1).contiguous().transpose(0, -1), weight.t().contiguous().t()
    found = gradients(lambda *t: products.linear(*t, groups=groups), [x, weight, bias])
    assert_close(found, gradients(lambda *t: grouped(*t, groups), [x, weight, bias]), TOLERANCE[dtype])
    alone = products.linear(x, weight, groups=groups)
    assert_close([alone], [grouped(x, weight, torch.zeros_like(bias), groups)], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_pointwise(way, shape, layout, dtype):
    x, weight, bias = operands(shape, 6, shape[1], dtype)
    weight = weight[:, :, None, None]
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = F.pad(x, (1, 2, 1, 0), value=torch.nan)[:, :, 1:, 1:-2]
    found = gradients(products.pointwise, [x, weight, bias])
    expected = gradients(F.conv2d, [t.double() for t in (x, weight, bias)])
    assert_close(found, [t.to(dtype) for t in expected], TOLERANCE[dtype])
    memory_format = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    assert found[0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 4, 11])
@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@torch.no_grad()
def test_add_mlp(way, fused, rows, dtype, monkeypatch):
    """Parts of four rows, the last one smaller."""
    monkeypatch.setattr(products, "_ROWS", 4)
    monkeypatch.setattr(products, "_FUSES", fused and products._FUSES)
    x, weight1, bias1 = operands((rows, 24), 40, 24, dtype)
    _, weight2, bias2 = operands((0,), 24, 40, dtype)
    exact = [t.double() for t in (x, weight1, bias1, weight2, bias2)]
    expected = exact[0] + F.linear(F.gelu(F.linear(*exact[:3])), *exact[3:])
    found = products.add_mlp_(x, weight1, bias1, weight2, bias2)
    assert found is x
    error = (found.double() - expected).abs().max() if rows else 0
    assert error <= TOLERANCE[dtype] * (expected.abs().max() if rows else 1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_relu(dtype, layout, stride):
    x, weight, bias = operands((2, 6, 9, 8), 5, 6 * 9, torch.float64)
    exact = [x, weight.unflatten(1, (6, 3, 3)), bias]
    x, weight, bias = (t.to(dtype) for t in exact)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :6]
    call = lambda *t: F.relu(F.conv2d(*t, stride))  # noqa: E731
    found = products.convolution_relu(x, weight, bias, stride)
    assert_close([found], [call(*exact).to(dtype)], TOLERANCE[dtype])
    if dtype.itemsize > 2:  # rounding moves small numbers across zero
        found = gradients(lambda *t: products.convolution_relu(*t, stride), [x, weight, bias])
        assert_close(found, [t.to(dtype) for t in gradients(call, exact)], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("output_padding", [0, 1])
def test_transposed_convolution_relu(dtype, layout, output_padding):
    x, weight, bias = operands((2, 6, 5, 4), 5, 6 * 9, torch.float64)
    exact = [x, weight.unflatten(1, (6, 3, 3)).transpose(0, 1), bias]
    x, weight, bias = (t.to(dtype) for t in exact)
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)[:, :6]
    sizes = (2, 1, output_padding)
    call = lambda *t: F.relu(F.conv_transpose2d(*t, *sizes))  # noqa: E731
    found = products.transposed_convolution_relu(x, weight, bias, *sizes)
    assert_close([found], [call(*exact).to(dtype)], TOLERANCE[dtype])
    if dtype.itemsize > 2:  # rounding moves small numbers across zero
        found = gradients(lambda *t: products.transposed_convolution_relu(*t, *sizes), [x, weight, bias])
        assert_close(found, [t.to(dtype) for t in gradients(call, exact)], TOLERANCE[dtype])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("output_padding", [None, 1], ids=["strided", "transposed"])
def test_strided_convolution(output_padding, layout, biased):
    """Values, gradients, and gradients of gradients are PyTorch's."""
    x, weight, bias = operands((2, 6, 9, 8), 5, 6 * 9, torch.float32)
    shape = (6, 3, 3) if output_padding is None else (5, 3, 3)
    weight = weight.reshape(-1, *shape)
    x, given = x.contiguous(memory_format=layout), (x, weight, bias) if biased else (x, weight)

    def plain(x, weight, bias=None):
        if output_padding is None:
            return F.conv2d(x, weight, bias, 2, 1)
        return F.conv_transpose2d(x, weight, bias, 2, 1, output_padding)

    def ours(x, weight, bias=None):
        return products.strided_convolution(x, weight, bias, 2, 1, output_padding)

    def results(call):
        tensors = [t.detach().requires_grad_() for t in given]
        out = call(*tensors)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return out, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    assert_close(results(ours), results(plain), 1e-4)
    assert_close([ours(*given)], [plain(*given)], 1e-5)


@pytest.mark.parametrize("output_padding", [None, 1], ids=["strided", "transposed"])
def test_strided_convolution_under_autocast(output_padding):
    x, weight, _ = operands((2, 6, 9, 8), 6, 6 * 9, torch.float32)
    x, weight = x.contiguous(memory_format=torch.channels_last), weight.reshape(6, 6, 3, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = products.strided_convolution(x, weight, None, 2, 1, output_padding)
    assert found.dtype == torch.bfloat16


@torch.no_grad()
def test_large_mlps_are_fused():
    """The operators of PyTorch's compiler are where they are looked for."""
    x, weight, bias = torch.randn(1024, 128), torch.randn(128, 128), torch.randn(128)
    with torch.profiler.profile() as profile:
        products.add_mlp_(x, weight, bias, weight, bias)
    fused = any("_convolution_pointwise" in event.key for event in profile.key_averages())
    assert fused == torch.backends.mkldnn.is_available()


def operators(call):
    """Names of the operators that a call runs."""
    with torch.profiler.profile() as profile:
        call()
    return " ".join(event.key for event in profile.key_averages())


def test_large_products_are_convolutions():
    """Where a gradient may be asked for; those of another dtype or under autocast are not."""

    def serves(dtype, rows=1024):
        x, weight = torch.randn(rows, 128, dtype=dtype), torch.randn(128, 128, dtype=dtype)
        return "convolution" in operators(lambda: products.linear(x, weight.requires_grad_()))

    assert serves(torch.float32) == torch.backends.mkldnn.is_available()
    assert not serves(torch.float32, rows=8)
    assert not serves(torch.float64)
    assert not serves(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(torch.float32)


def test_large_products_without_gradients_are_fused():
    def fuses(dtype, rows=1024):
        x, weight = torch.randn(rows, 128, dtype=dtype), torch.randn(128, 128, dtype=dtype)
        return "_linear_pointwise" in operators(lambda: products.linear(x, weight, activation="gelu"))

    for dtype in (torch.float32, torch.bfloat16):
        assert fuses(dtype) == torch.backends.mkldnn.is_available()
        assert not fuses(dtype, rows=8)
    assert not fuses(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert not fuses(torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_activations(way, layout, activation, dtype):
    """Of maps, and of their pixels as rows."""
    x, weight, bias = operands((2, 6, 9, 8), 5, 6, torch.float64)
    expected = F.conv2d(x, weight[:, :, None, None], bias)
    expected = expected if activation == "none" else getattr(F, activation)(expected)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
    if layout != "contiguous":
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.cat([torch.full_like(x, torch.nan), x], dim=1)[:, 6:]
    found = products.pointwise(x, weight[:, :, None, None], bias, activation)
    assert_close([found], [expected.to(dtype)], TOLERANCE[dtype])
    found = products.linear(x.permute(0, 2, 3, 1), weight, bias, activation=activation)
    assert_close([found.permute(0, 3, 1, 2)], [expected.to(dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("groups", [1, 4])
def test_autocast(way, groups):
    x, weight, _ = operands((6, 16), 8, 16 // groups, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = products.linear(x, weight, groups=groups)
    assert found.dtype == torch.bfloat16
    assert_close([found.float()], [grouped(x, weight, torch.zeros(8), groups)], 0.05)


@pytest.mark.parametrize("groups", [1, 4])
def test_compiled(way, groups):
    torch._dynamo.reset()
    tensors = operands((6, 16), 8, 16 // groups, torch.float32)
    call = lambda *t: products.linear(*t, groups=groups)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_close(gradients(compiled, tensors), gradients(call, tensors), 1e-5)


def test_gradients_of_gradients(way):
    tensors = [t.requires_grad_() for t in operands((3, 8), 4, 4, torch.float64)]
    call = lambda *t: products.linear(*t, groups=2)  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_meta(way):
    layer = products.Linear(16, 8, device="meta")
    assert layer(torch.empty(3, 16, device="meta")).shape == (3, 8)


def test_modules_are_pytorchs(way):
    """By name, type and state: what finds or replaces layers by their type still does."""
    linear, pointwise = products.Linear(6, 4), products.Pointwise(6, 4)
    x = torch.randn(2, 5, 6)
    assert isinstance(linear, torch.nn.Linear)
    assert_close([linear(x)], [F.linear(x, linear.weight, linear.bias)], 1e-5)
    maps = torch.randn(2, 6, 3, 5).contiguous(memory_format=torch.channels_last)
    assert isinstance(pointwise, torch.nn.Conv2d)
    assert_close([pointwise(maps)], [F.conv2d(maps, pointwise.weight, pointwise.bias)], 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape, outputs, kernel, padding",
    [
        ((2, 5, 8, 6), 3, (3, 3), (1, 1)),
        ((1, 16, 12, 10), 1, (7, 7), (0, 0)),
        ((1, 4, 5, 9), 4, (2, 4), (0, 0)),
        ((1, 4, 8, 8), 5, (3, 3), (1, 1)),  # too many outputs
        ((1, 4, 7, 8), 2, (3, 3), (1, 1)),  # an odd row
        ((0, 3, 4, 4), 2, (3, 3), (1, 1)),
    ],
    ids=str,
)
def test_narrow_convolution(shape, outputs, kernel, padding, dtype):
    """With gradients PyTorch's own, without them the same numbers."""
    torch.manual_seed(0)
    tensors = [
        torch.randn(size, dtype=torch.float64).to(dtype)
        for size in (shape, (outputs, shape[1], *kernel), (outputs,))
    ]

    def narrow(*tensors):
        return products.narrow_convolution(*tensors, padding)

    def plain(*tensors):
        return F.conv2d(*tensors, padding=padding)

    expected = gradients(plain, tensors)
    assert_close(gradients(narrow, tensors), expected, TOLERANCE[dtype])
    with torch.no_grad():
        assert_close([narrow(*tensors)], expected[:1], TOLERANCE[dtype])


@torch.no_grad()
def test_narrow_convolution_takes_pixels_together(monkeypatch):
    strides = []

    def record(x, weight, bias, stride, padding):
        strides.append((stride, len(weight)))
        return convolve(x, weight, bias, stride, padding)

    convolve = F.conv2d
    monkeypatch.setattr(F, "conv2d", record)
    out = products.narrow_convolution(
        torch.randn(1, 4, 8, 6), torch.randn(3, 4, 7, 7), torch.randn(3), (3, 3)
    )
    assert out.shape == (1, 3, 8, 6) and strides == [(2, 12)]
