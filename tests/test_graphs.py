"""CUDA graphs: recorded once per kind, the same numbers as eager, and nothing in a step that waits."""

from __future__ import annotations

import copy
import pickle
import warnings
from contextlib import nullcontext
from dataclasses import dataclass

import fake_cuda
import pytest
import torch
from test_generator import SMALL_CALL, SMALL_CONFIGS, recipe, small
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gi_kernels
from gi_model import graphs
from gi_model.flow import RAFT, FlowStage
from gi_model.generator import CrossingGenerator
from gi_model.graphs import Graphs, hold

OTHER_CALL = {key: recipe.uniform(f"other/{key}", *value.shape) for key, value in SMALL_CALL.items()}


@pytest.fixture
def gpu(monkeypatch):
    """Work on the CPU is recorded."""
    fake_cuda.install(monkeypatch)


@pytest.fixture
def counted():
    """A function of two tensors, and how often Python ran it."""

    class Counted:
        calls = 0

        def __call__(self, x, y):
            self.calls += 1
            z = (x * 2).add_(y)
            z[:1] += 1
            return z, z.relu().t()

    return Counted()


def pair(seed: float, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full(shape, seed), torch.arange(seed, seed + torch.Size(shape).numel()).view(shape)


# -- the runner ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_kind_is_recorded_once_and_replayed(gpu, counted):
    runner = Graphs()
    for seed in (1.0, -3.0, 5.0):
        arguments = pair(seed, 3, 4)
        z, parts = runner.run(counted, *arguments)
        expected = 2 * arguments[0] + arguments[1]
        expected[:1] += 1
        assert torch.equal(z, expected) and torch.equal(parts, expected.relu().t())
        assert parts.stride() == (1, 4)
    assert counted.calls == graphs.WARM_UPS + 1 and len(runner) == 1


@torch.no_grad()
def test_results_belong_to_the_caller(gpu, counted):
    runner = Graphs()
    first, _ = runner.run(counted, *pair(1.0, 2, 2))
    kept = first.clone()
    second, _ = runner.run(counted, *pair(7.0, 2, 2))
    second.zero_()
    assert torch.equal(first, kept)
    assert torch.equal(runner.run(counted, *pair(1.0, 2, 2))[0], kept)


@dataclass(frozen=True)
class Box:
    tensor: torch.Tensor
    size: tuple[int, int]
    parts: tuple[torch.Tensor, ...] = ()


@torch.no_grad()
def test_arguments_and_results_of_several_tensors(gpu):
    def function(box, scale, nothing):
        return Box(box.tensor * scale, box.size, tuple(p + 1 for p in box.parts)), [nothing, box.parts[0]]

    runner = Graphs()
    for seed in (1.0, 2.0):
        a, b = pair(seed, 2, 3)
        box, (nothing, part) = runner.run(function, Box(a, (2, 3), (b, a)), 3, None)
        assert torch.equal(box.tensor, 3 * a) and box.size == (2, 3) and nothing is None
        assert torch.equal(box.parts[0], b + 1) and torch.equal(box.parts[1], a + 1)
        assert torch.equal(part, b)
    assert len(runner) == 1


@torch.no_grad()
def test_everything_that_matters_makes_a_kind(gpu):
    runner = Graphs(most=100)

    def function(x, factor=1):
        return x @ x.t() * factor

    x = torch.rand(4, 4)
    calls = [
        lambda: runner.run(function, x),
        lambda: runner.run(function, x[:2]),
        lambda: runner.run(function, x.t()),
        lambda: runner.run(function, x.double()),
        lambda: runner.run(function, x, 2),
        lambda: runner.run(torch.relu, x),
    ]
    for i, call in enumerate(calls):
        call()
        call()
        assert len(runner) == i + 1
    with torch.autocast("cpu", torch.bfloat16):
        assert calls[0]().dtype == torch.bfloat16
    assert calls[0]().dtype == torch.float32
    with gi_kernels.backend("reference"):
        calls[0]()
    assert len(runner) == len(calls) + 2


@torch.no_grad()
def test_the_kinds_used_last_are_kept(gpu, counted):
    runner = Graphs(most=2)
    for n in (1, 2, 1, 3, 1, 2):  # 2 is dropped for 3
        runner.run(counted, *pair(1.0, n, 2))
        assert len(runner) <= 2
    assert counted.calls == 4 * (graphs.WARM_UPS + 1)
    runner.clear()
    assert len(runner) == 0


@torch.no_grad()
def test_weights_that_change_in_place_or_move(gpu):
    layer = torch.nn.Linear(3, 3)
    runner, calls = Graphs(), []

    def function(x):
        calls.append(1)
        return layer(x)

    def check():
        x = torch.rand(2, 3)
        assert torch.equal(runner.run(function, x, weights=layer.parameters), layer(x))

    check()
    layer.weight.mul_(2)
    check()
    assert len(calls) == graphs.WARM_UPS + 1
    layer.weight.data = torch.rand(3, 3)  # as moving a module does
    check()
    check()
    assert len(calls) == 2 * (graphs.WARM_UPS + 1) and len(runner) == 1


@torch.no_grad()
def test_what_is_held_lives_as_long_as_the_graph(gpu):
    kept = torch.rand(2)
    runner = Graphs()
    assert hold(kept) is kept
    runner.run(lambda x: x + hold(kept), torch.rand(2))
    (graph,) = runner._graphs.values()
    assert len(graph.held) == 1 and graph.held[0] is kept
    hold(torch.rand(2))
    assert len(graph.held) == 1


def test_eager_where_autograd_is_on(gpu, counted):
    x, y = pair(1.0, 2, 2)
    runner = Graphs()
    z, _ = runner.run(counted, x.requires_grad_(), y)
    z.sum().backward()
    assert torch.equal(x.grad, torch.full((2, 2), 2.0)) and len(runner) == 0


@torch.no_grad()
def test_eager_elsewhere(gpu, counted, monkeypatch):
    runner = Graphs()
    x, y = pair(1.0, 2, 2)
    runner.run(lambda: None)
    runner.run(lambda a, b: (a, b), x, torch.empty(1, device="meta"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        runner.run(counted, x, y)
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "DEVICE", "cuda")
        runner.run(counted, x, y)
    assert counted.calls == 2 and len(runner) == 0


@torch.no_grad()
def test_eager_under_compile(gpu, counted):
    runner = Graphs()
    arguments = pair(1.0, 2, 2)

    def function(x, y):
        return runner.run(lambda a, b: a * hold(b), x, y)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), arguments[0] * arguments[1]) and len(runner) == 0


@torch.no_grad()
def test_what_cannot_be_recorded_runs_eagerly_after_one_warning(gpu):
    runner, calls = Graphs(), []

    def looks(x):
        calls.append(1)
        return x * x.max().item()

    def looks_too(x):
        return x[x > 0]

    x = torch.rand(3)
    with pytest.warns(
        RuntimeWarning, match=r"looks runs without a CUDA graph, .*not permitted.*_local_scalar"
    ):
        assert torch.equal(runner.run(looks, x), x * x.max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(runner.run(looks, 2 * x), 2 * x * (2 * x).max())
        assert torch.equal(runner.run(looks_too, x), x[x > 0])
    assert len(calls) == graphs.WARM_UPS + 3 and len(runner) == 0


@torch.no_grad()
def test_errors_of_the_function_itself_are_raised(gpu):
    def refuses(x):
        raise ValueError("x: expected another")

    def fails(x):
        raise RuntimeError("no memory")

    with pytest.raises(ValueError, match="x: expected another"):
        Graphs().run(refuses, torch.rand(1))
    with pytest.raises(RuntimeError, match="no memory"), pytest.warns(RuntimeWarning, match="no memory"):
        Graphs().run(fails, torch.rand(1))


def test_under_inference_mode_and_outside(gpu, counted):
    runner = Graphs()
    with torch.inference_mode():
        runner.run(counted, *pair(1.0, 2, 2))
        expected, _ = runner.run(counted, *pair(2.0, 2, 2))
    with torch.no_grad():
        assert torch.equal(runner.run(counted, *pair(2.0, 2, 2))[0], expected)
    assert len(runner) == 1


@torch.no_grad()
def test_copies_and_pickles_have_no_graphs(gpu, counted):
    runner = Graphs(most=3)
    runner.run(counted, *pair(1.0, 2, 2))
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert len(other) == 0 and other.most == 3


# -- the step -----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_generator_by_graph_is_eager(name, dtype, backend, monkeypatch):
    fast = small(name).for_inference(dtype)
    with gi_kernels.backend(backend):
        expected = [fast(**call) for call in (SMALL_CALL, OTHER_CALL, SMALL_CALL)]
        with monkeypatch.context() as patch:
            fake_cuda.install(patch)
            for call, image in zip((SMALL_CALL, OTHER_CALL, SMALL_CALL), expected, strict=True):
                assert torch.equal(fast(**call), image)
            if isinstance(fast, CrossingGenerator):
                references = fast.encode_references(SMALL_CALL["srcs"])
                arguments = {key: SMALL_CALL[key] for key in ("input", "flows", "flow_errs")}
                assert torch.equal(fast(**arguments, references=references), expected[0])
    assert len(fast.graphs) == (2 if isinstance(fast, CrossingGenerator) else 1)
    # An ordinary generator may be trained: it has none.
    with monkeypatch.context() as patch:
        fake_cuda.install(patch)
        plain = small(name)
        plain(**SMALL_CALL)
        assert len(plain.graphs) == 0


@torch.no_grad()
def test_a_generator_holds_the_position_code_that_its_graph_reads(gpu):
    fast = small().for_inference()
    fast(**SMALL_CALL)
    (code,) = fast.code.kept.values()
    assert all(any(t is code for t in graph.held) for graph in fast.graphs._graphs.values())


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("is_small", [True, False], ids=["small", "large"])
def test_flow_stage_by_graph_is_eager(is_small, backend, monkeypatch):
    torch.manual_seed(0)
    stage = FlowStage(RAFT(small=is_small), resolution=(64, 64), iterations=2)

    def frames(hole: slice):
        rgba = torch.rand(2, 3, 4, 72, 80)
        rgba[:, :, 3] = 0
        rgba[:, 0, 3, hole, 10:30] = 1
        return rgba[:, 0], rgba[:, 1:]

    calls = [frames(slice(20, 40)), frames(slice(3, 60)), frames(slice(0, 0))]

    def outcomes():
        for target, sources in calls:
            kept = [stage.encode(s) for s in sources.unbind(1)]
            yield from (*stage(target, sources), *stage(target, kept), *stage.both_ways(target, kept))

    with gi_kernels.backend(backend):
        expected = list(outcomes())
        fake_cuda.install(monkeypatch)
        for actual, eager in zip(outcomes(), expected, strict=True):
            assert torch.equal(actual, eager)
    assert len(stage.graphs) == 4


class Watch(TorchDispatchMode):
    """Fails on what makes the host wait for a GPU, and on numbers that are copied to it."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not fake_cuda.waits(function, args), f"{function} waits for the GPU"
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        from_host = [t for t in given if t.device.type == "cpu"]
        assert not from_host, f"{function} of a tensor on the host, {tuple(from_host[0].shape)}"
        assert "device" not in (kwargs or {}) or torch.device(kwargs["device"]).type == "meta", (
            f"{function} to the host"
        )
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                assert result.device.type == "meta", f"{function} gives a tensor on {result.device}"
        self.seen.add(function.name())
        return results


class WatchNumbers(TorchFunctionMode):
    """Fails where Python makes a tensor of numbers: operators do not show that these come from the host."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.Tensor.new_tensor)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in self.MAKERS, f"{function.__name__} copies numbers from the host"
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(i, list) for i in indices), "a list of indices is copied from the host"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors without values, which take the way of those on a GPU: that of the definitions."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # is only told of real devices
    with torch.device("meta"), torch.no_grad():
        yield


BAD = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: 1 if x.any() else 0,
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "list index": lambda x: x[[0, 1]],
    "numbers": lambda x: x * torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "new numbers": lambda x: x * x.new_tensor([1.0, 2.0, 3.0]),
    "from the host": lambda x: x + torch.ones(3, device="cpu").to(x.device),
    "to the host": lambda x: x.cpu(),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("name", BAD)
def test_the_watch_notices(fake_gpu, name):
    x = torch.rand(3)
    with Watch(), WatchNumbers(), pytest.raises(AssertionError, match=r"waits|host"):
        BAD[name](x)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_generator_does_not_wait(fake_gpu, name, dtype):
    from gi_model import build_generator

    fast = build_generator(SMALL_CONFIGS[name]).eval().for_inference(dtype)
    call = {key: torch.rand(value.shape) for key, value in SMALL_CALL.items()}
    with WatchNumbers(), Watch() as watch:
        assert fast(**call).shape == (2, 3, 32, 48)
        if isinstance(fast, CrossingGenerator):
            references = fast.encode_references(call.pop("srcs"))
            fast(**call, references=references)
    assert "aten::convolution" in watch.seen


@pytest.mark.parametrize("is_small", [True, False], ids=["small", "large"])
def test_flow_stage_does_not_wait(fake_gpu, is_small):
    stage = FlowStage(RAFT(small=is_small), resolution=(64, 64), iterations=2)
    target, sources = torch.rand(2, 4, 72, 80), torch.rand(2, 3, 4, 72, 80)
    with WatchNumbers(), Watch() as watch:
        flow, error = stage(target, sources)
        assert (flow.shape, error.shape) == ((2, 3, 2, 72, 80), (2, 3, 1, 72, 80))
        stage.both_ways(stage.encode(target), [stage.encode(s) for s in sources.unbind(1)])
    assert "aten::searchsorted.Tensor" in watch.seen
