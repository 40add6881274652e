"""How much memory a call needs beyond what was allocated before it."""

from __future__ import annotations

from collections.abc import Callable

import torch


def peak_extra_bytes(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak of what is allocated during ``call``, its result included, above what was there before.

    Exact to the byte and the same on every run, because it counts PyTorch's allocations rather than
    pages: on the CPU the profiler reports every allocation and release of the allocator, which also
    serves oneDNN's scratch space and the compiled kernels; on a CUDA device the caching allocator
    keeps the peak itself. Not counted: what libraries allocate past PyTorch (the packing buffers of
    matrix products, a few hundred KiB per thread).
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        result = call()
    del result
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
