"""Seeded faults in the CPU and CUDA kernels: each must be caught by the tests named with it.

A mutant replaces one piece of text, which must occur exactly once in its file.
"""

from __future__ import annotations

from dataclasses import dataclass

VALUES = "tests/contract/test_values.py"
LAYOUTS = "tests/contract/test_layouts.py"
POSITIONS = "tests/contract/test_positions.py"
RUNTIME = "tests/contract/test_runtime.py"
LAYOUT = "tests/test_layout.py"
ATTENTION = "tests/test_attention.py"
NORMS = "tests/test_norms.py"
DEVICE_HEADERS = ("common/contributors.h", "common/device.h", "common/device_windows.h")


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` becomes ``new`` in ``csrc/file``; ``tests`` that match ``select`` must fail."""

    name: str
    file: str
    old: str
    new: str
    select: str
    tests: tuple[str, ...] = (VALUES,)

    @property
    def emulated(self) -> bool:
        """Whether the fault is in code of the CUDA kernels."""
        return self.file.endswith(("cuda.cu", "bind_cuda.cpp")) or self.file in DEVICE_HEADERS


MUTANTS = (
    # ---- shared maths: flow_warp stands for every operator that uses it ----
    Mutant(
        "axes of the tap weights swapped",
        "common/bilinear.h",
        "return ((k & 1) ? fx : 1 - fx) * ((k & 2) ? fy : 1 - fy);",
        "return ((k & 1) ? fy : 1 - fy) * ((k & 2) ? fx : 1 - fx);",
        "flow_warp",
    ),
    Mutant(
        "last row of taps lost",
        "common/bilinear.h",
        "bottom = t.y0 + 1 < height;",
        "bottom = t.y0 + 2 < height;",
        "flow_warp",
    ),
    Mutant(
        "positions just left of the frame dropped",
        "common/bilinear.h",
        "if (!(x >= -1 && x < width",
        "if (!(x >= 0 && x < width",
        "flow_warp",
    ),
    Mutant(
        "truncation instead of floor",
        "common/bilinear.h",
        "t.y0 = floor_of<int>(y);",
        "t.y0 = static_cast<int>(y);",
        "flow_warp",
    ),
    Mutant(
        "derivative of the weights along y negated",
        "common/bilinear.h",
        "return ((k & 2) ? A(1) : A(-1)) * ((k & 1) ? fx : 1 - fx);",
        "return ((k & 2) ? A(-1) : A(1)) * ((k & 1) ? fx : 1 - fx);",
        "flow_warp",
    ),
    Mutant(
        "resize without align_corners",
        "common/bilinear.h",
        "A(from_ - 1) / A(to - 1)",
        "A(from_) / A(to)",
        "flow_warp",
    ),
    Mutant(
        "resized flow scaled with the other axis",
        "common/bilinear.h",
        "u *= scale_x;",
        "u *= scale_y;",
        "flow_warp",
    ),
    Mutant(
        "tap dropped in the gather",
        "common/gather.h",
        " +\n         load<A>(t.row[2] + c) * t.weight[2] + load<A>(t.row[3] + c) * t.weight[3];",
        " +\n         load<A>(t.row[2] + c) * t.weight[2];",
        "flow_warp",
    ),
    Mutant(
        "gradient block not zero-initialised",
        "common/gather.h",
        "    std::memset(memory, 0, H * W * stride * sizeof(A));\n",
        "",
        "flow_warp",
    ),
    Mutant(
        "partial gradients of the flow overwritten instead of summed",
        "common/gather.h",
        "g += from[part * part_stride];",
        "g = from[part * part_stride];",
        "flow_warp",
    ),
    Mutant(
        "tap dropped in the gradient of the resize",
        "common/gather.h",
        "        target[i64(y1) * w + x0] += fy * (1 - fx) * g;\n",
        "",
        "flow_warp",
    ),
    Mutant(
        "32-bit batch offset",
        "common/gather.h",
        "return {static_cast<T*>(a.data) + b * a.stride[0] + c * a.stride[1], a.stride[1]",
        "return {static_cast<T*>(a.data) + int(b) * int(a.stride[0]) + c * a.stride[1], a.stride[1]",
        "flow_warp and beyond_32",
        (RUNTIME,),
    ),
    Mutant(
        "bfloat16 truncated instead of rounded",
        "common/simd.h",
        "const WordBits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;",
        "const WordBits rounded = u >> 16;",
        "flow_warp",
    ),
    # ---- flow_warp ----
    Mutant(
        "input gradient overwritten instead of accumulated",
        "flow_warp/cpu.cpp",
        "store<A>(row + c, load<A>(row + c) + load<A>(g + c) * weight);",
        "store<A>(row + c, load<A>(g + c) * weight);",
        "flow_warp",
    ),
    Mutant(
        "every item warped along the first flow",
        "flow_warp/cpu.cpp",
        "static_cast<const A*>(flow) + b * 2 * h * w",
        "static_cast<const A*>(flow) + 0 * b * 2 * h * w",
        "flow_warp",
    ),
    Mutant(
        "last, partial band of rows left out",
        "flow_warp/cpu.cpp",
        "(H + kBandRows - 1) / kBandRows",
        "H / kBandRows",
        "flow_warp",
        (LAYOUTS,),
    ),
    Mutant(
        "channel blocks start one channel late",
        "flow_warp/cpu.cpp",
        "const i64 c0 = block * s.channels, channels",
        "const i64 c0 = block * (s.channels + (block > 0)), channels",
        "flow_warp",
    ),
    # ---- deformable_aggregation ----
    Mutant(
        "softmax over references without their largest key",
        "deformable_aggregation/cpu.cpp",
        "for (i64 t = 1; t < T; ++t) top = vmax<A>(k[t], top);",
        "",
        "deformable_aggregation",
    ),
    Mutant(
        "error weight of the keys used for the values",
        "deformable_aggregation/cpu.cpp",
        "return gather<A, S>(r.values, c) + load<A>(w.value_error + c) * r.error;",
        "return gather<A, S>(r.values, c) + load<A>(w.key_error + c) * r.error;",
        "deformable_aggregation",
    ),
    Mutant(
        "mean missing from the softmax's gradient",
        "deformable_aggregation/cpu.cpp",
        "gv * (memory.v[t] - mean);",
        "gv * memory.v[t];",
        "deformable_aggregation",
    ),
    Mutant(
        "flow of another reference",
        "deformable_aggregation/cpu.cpp",
        "static_cast<const A*>(a.flows) + (b * T + t) * 2",
        "static_cast<const A*>(a.flows) + (b + t) * 2",
        "deformable_aggregation",
    ),
    Mutant(
        "bias gradient not accumulated over pixels",
        "deformable_aggregation/cpu.cpp",
        "load<A>(weight_sums + 2 * weight_stride + c) + g);",
        "g);",
        "deformable_aggregation",
    ),
    # ---- flow_consistency, complete_flow, convex_upsample ----
    Mutant(
        "flow components swapped in the position",
        "flow_consistency/cpu.cpp",
        "taps(A(x) + lane + u[0], A(y) + u[1]",
        "taps(A(x) + lane + u[1], A(y) + u[0]",
        "flow_consistency",
    ),
    Mutant(
        "taps outside the frame used",
        "flow_consistency/cpu.cpp",
        "(taps.inside[k] ? load<A>(tap[c][k]) : splat<A>(0))",
        "load<A>(tap[c][k])",
        "flow_consistency",
    ),
    Mutant(
        "positions of a vector truncated instead of rounded down",
        "common/gather.h",
        "    whole[0] += __builtin_convertvector(whole[0], Vec<A>) > position;  // a true lane is -1\n",
        "",
        "flow_consistency",
    ),
    Mutant(
        "wrong power of the distance",
        "complete_flow/cpu.cpp",
        "1 / (squared * squared * squared)",
        "1 / (squared * squared)",
        "complete_flow",
    ),
    Mutant(
        "a side of the rim's cross forgotten",
        "complete_flow/cpu.cpp",
        "outside(m[-mask.sy]) || outside(m[mask.sy])",
        "outside(m[-mask.sy])",
        "complete_flow",
    ),
    Mutant(
        "neighbours transposed",
        "convex_upsample/cpu.cpp",
        "const i64 row = y + k / 3 - 1, column = x + k % 3 - 1;",
        "const i64 row = y + k % 3 - 1, column = x + k / 3 - 1;",
        "convex_upsample",
    ),
    Mutant(
        "one neighbour missing from the flow's gradient",
        "convex_upsample/cpu.cpp",
        "        for (int k = 0; k < kNeighbours; ++k) {\n          const i64 row = y - (k / 3 - 1)",
        "        for (int k = 1; k < kNeighbours; ++k) {\n          const i64 row = y - (k / 3 - 1)",
        "convex_upsample",
    ),
    # ---- matrix products, global_attention ----
    Mutant(
        "last odd row of a product left out",
        "common/product.h",
        "if (m < rows) tile(Height<1>{}, m);",
        "if (m + 1 < rows) tile(Height<1>{}, m);",
        "global_attention",
    ),
    Mutant(
        "second panel packed over the first",
        "common/product.h",
        "n += kPanel<A>, panels += depth * kPanel<A>)",
        "n += kPanel<A>, panels += 0)",
        "global_attention",
    ),
    Mutant(
        "second part of the depth replaces the first",
        "product/cpu.cpp",
        "p.add || s > 0 || k0 > 0 ?",
        "p.add || s > 0 ?",
        "pixel_projection",
    ),
    Mutant(
        "gradient of a weight sees the last frame only",
        "product/cpu.cpp",
        "p.add || s > 0 || k0 > 0 ?",
        "p.add || k0 > 0 ?",
        "pixel_projection",
    ),
    Mutant(
        "columns of the last panel not added to",
        "product/cpu.cpp",
        "  if (into == Into::add) {\n    std::memset(block",
        "  if (false) {\n    std::memset(block",
        "pixel_projection",
    ),
    Mutant(
        "rows beyond a block are those of the first",
        "product/cpu.cpp",
        "left_factor<A>(p.a, a + m * p.a.outer,",
        "left_factor<A>(p.a, a + m0 * p.a.outer,",
        "pixel_projection",
    ),
    Mutant(
        "references' gradient from the last block of channels only",
        "projected_aggregation/bind.cpp",
        "weights.expand({frames, 1, 2 * count, R}), first > 0)",
        "weights.expand({frames, 1, 2 * count, R}), false)",
        "projected_aggregation",
        (VALUES, LAYOUTS),
    ),
    Mutant(
        "parts of the flows' gradient on top of each other",
        "projected_aggregation/bind.cpp",
        "map_parts.narrow(0, aggregation_blocks(first),",
        "map_parts.narrow(0, 0,",
        "projected_aggregation",
    ),
    Mutant(
        "sums not rescaled when a larger score is met",
        "global_attention/cpu.cpp",
        "scale(sums, width, shrink);",
        "scale(sums, width, A(1));",
        "global_attention",
    ),
    Mutant(
        "scores beyond the last key count as zero",
        "global_attention/cpu.cpp",
        "scores[j] = -__builtin_huge_val();",
        "scores[j] = 0;",
        "global_attention",
    ),
    Mutant(
        "scores relative to minus infinity",
        "global_attention/cpu.cpp",
        "splat<A>(new_top == -__builtin_huge_val() ? A(0) : new_top)",
        "splat<A>(new_top)",
        "global_attention",
        (POSITIONS,),
    ),
    Mutant(
        "log-sum-exp without its maximum",
        "global_attention/cpu.cpp",
        "= state.top[i] + __builtin_log(state.total[i]);",
        "= __builtin_log(state.total[i]);",
        "global_attention",
    ),
    Mutant(
        "gradient of scores without the mean",
        "global_attention/cpu.cpp",
        "p * (load<A>(grads + j) - dot)",
        "p * (load<A>(grads + j) - A(0))",
        "global_attention",
    ),
    Mutant(
        "gradient of scores from the rounded output",
        "global_attention/cpu.cpp",
        "add_dots(a.remainder);",
        "",
        "global_attention or equal_values",
        (ATTENTION,),
    ),
    Mutant(
        "keys' gradient sees the first block of queries only",
        "global_attention/cpu.cpp",
        "query_panels + i * kPanel<A>",
        "query_panels",
        "global_attention",
    ),
    # ---- window_pool, window_spread ----
    Mutant(
        "rows of windows counted as columns",
        "common/windows.h",
        "return {item / pieces / rows, row * columns + column, count,",
        "return {item / pieces / rows, row * rows + column, count,",
        "window_pool",
    ),
    Mutant(
        "dot products of heads not zero-initialised",
        "common/windows.h",
        "  if (slab.data) std::memset(slab.data, 0, height * slab.sy * sizeof(A));\n",
        "",
        "window_spread",
    ),
    Mutant(
        "softmax of a window without its largest logit",
        "window_pool/cpu.cpp",
        "top = vmax<A>(top, load<A>(logits.at(y, x) + h));",
        "top = load<A>(logits.at(y, x) + h);",
        "window_pool",
    ),
    Mutant(
        "mean missing from the gradient of the window's softmax",
        "window_pool/cpu.cpp",
        "(load<A>(at) - mean));",
        "load<A>(at));",
        "window_pool",
    ),
    Mutant(
        "every step of rows overwrites the window's sum",
        "window_pool/cpu.cpp",
        "sums.head, y0 > 0);",
        "sums.head, false);",
        "window_pool",
    ),
    Mutant(
        "derivative of the sigmoid without its complement",
        "window_spread/cpu.cpp",
        "(gate * (A(1) - gate))",
        "gate",
        "window_spread",
    ),
    # ---- correlation_lookup ----
    Mutant(
        "levels scaled by their number instead of its power of two",
        "correlation_lookup/place.h",
        "const A scale = A(1) / A(i64(1) << level);\n  return place_of",
        "const A scale = A(1) / A(i64(1) + level);\n  return place_of",
        "correlation_lookup",
    ),
    Mutant(
        "window blended down with the fraction across",
        "correlation_lookup/cpu.cpp",
        "block[k] = (1 - p.fy) * above + p.fy * below;",
        "block[k] = (1 - p.fx) * above + p.fx * below;",
        "correlation_lookup",
    ),
    Mutant(
        "first column of the map left out of the windows",
        "correlation_lookup/place.h",
        "p.i0 = maximum<i64>(0, -p.x);",
        "p.i0 = maximum<i64>(0, 1 - p.x);",
        "correlation_lookup",
    ),
    # ---- relayout ----
    Mutant(
        "rows joined although one of the maps has gaps between them",
        "common/rows.h",
        "for (const Array* map : maps)\n    if",
        "for (const Array* map : {*(maps.end() - 1)})\n    if",
        "copy",
        (LAYOUT,),
    ),
    Mutant(
        "last pixels of a row lost",
        "relayout/cpu.cpp",
        "(a.source.size[3] + kRelayoutPixels - 1) / kRelayoutPixels",
        "a.source.size[3] / kRelayoutPixels",
        "copy",
        (LAYOUT,),
    ),
    Mutant(
        "pixels of part of a vector taken for a slab",
        "relayout/cpu.cpp",
        "map.stride[3] >= map.size[1] &&\n         map.size[1] % kLanes<A> == 0;",
        "map.stride[3] >= map.size[1];",
        "copy",
        (LAYOUT,),
    ),
    Mutant(
        "every block of channels copied from the first",
        "relayout/cpu.cpp",
        "stage_row<A, T>(source.data + c * source.sc,",
        "stage_row<A, T>(source.data,",
        "copy",
        (LAYOUT,),
    ),
    # ---- batch_norm ----
    Mutant(
        "pieces of different sizes weighed alike",
        "batch_norm/cpu.cpp",
        "const double n = double(piece_of(a, item).pixels);",
        "const double n = 1;",
        "agrees",
        (NORMS,),
    ),
    Mutant(
        "distance of a piece's mean from the mean lost",
        "batch_norm/cpu.cpp",
        "+ double(piece_of(a, item).pixels) * deviation * deviation;",
        ";",
        "agrees",
        (NORMS,),
    ),
    Mutant(
        "last pixels of a row lost in the norm",
        "batch_norm/cpu.cpp",
        "(a.input.size[3] + kNormPixels - 1) / kNormPixels",
        "maximum<i64>(1, a.input.size[3] / kNormPixels)",
        "agrees",
        (NORMS,),
    ),
    Mutant(
        "parameters of every block of channels from the first",
        "batch_norm/cpu.cpp",
        "norm.mean.at(c0 + c), c0 + c));",
        "norm.mean.at(c0 + c), c));",
        "agrees",
        (NORMS,),
    ),
    Mutant(
        "gradient past the ReLU",
        "batch_norm/cpu.cpp",
        "return relu ? (affine(deviation, c) <= 0 ? splat<A>(0) : grad) : grad;",
        "return relu ? grad : grad;",
        "agrees",
        (NORMS,),
    ),
    Mutant(
        "slope of the gradient divided by the deviation once",
        "batch_norm/cpu.cpp",
        "totals[C + c] / pixels * inverse * inverse;",
        "totals[C + c] / pixels * inverse;",
        "agrees",
        (NORMS,),
    ),
    Mutant(
        "NaN turned to zero by the ReLU",
        "batch_norm/cpu.cpp",
        "(y < 0 ? splat<A>(0) : y)",
        "(y > 0 ? y : splat<A>(0))",
        "nan",
        (NORMS,),
    ),
    # ---- CUDA kernels ----
    Mutant(
        "taps of a pixel taken from the wrong cells",
        "common/contributors.h",
        "start[k] = cell[(k & 2 ? 0 : width + 1) + (k & 1 ? 0 : 1)];",
        "start[k] = cell[(k & 1 ? 0 : width + 1) + (k & 2 ? 0 : 1)];",
        "flow_warp",
    ),
    Mutant(
        "a list loses what was in it",
        "common/contributors.h",
        "const i64 next = exchange(cell, pixel);",
        "exchange(cell, pixel);\n    const i64 next = kEnd;",
        "flow_warp",
    ),
    Mutant(
        "reach of a coarse pixel one short",
        "common/contributors.h",
        "last = (A(i) + 1) / axis.scale + 2;",
        "last = (A(i) + 1) / axis.scale;",
        "flow_warp",
    ),
    Mutant(
        "gradient of the flow not scaled",
        "common/contributors.h",
        "(same ? A(1) : channel == 0 ? scale_x : scale_y)",
        "(same ? A(1) : channel == 0 ? scale_y : scale_x)",
        "flow_warp",
    ),
    Mutant(
        "packs read where rows are not aligned",
        "common/device.h",
        "return a.stride[channel] == 1 && offsets % kPack<T> == 0;",
        "return a.stride[channel] == 1;",
        "flow_warp",
        (LAYOUTS,),
    ),
    Mutant(
        "lanes skip channels",
        "flow_warp/cuda.cu",
        "c += i64(team.lanes) * V) {\n      A here[V];",
        "c += i64(team.lanes + 1) * V) {\n      A here[V];",
        "flow_warp",
    ),
    Mutant(
        "gradient along x written twice",
        "flow_warp/cuda.cu",
        "parts[(b * 2 + 1) * plane + pixel] = gy;",
        "parts[(b * 2 + 1) * plane + pixel] = gx;",
        "flow_warp",
    ),
    Mutant(
        "softmax does not rescale what it has",
        "deformable_aggregation/cuda.cu",
        "sum[i] * old + now * s.value[i]",
        "sum[i] + now * s.value[i]",
        "deformable_aggregation",
    ),
    Mutant(
        "infinite key taken for a large one",
        "deformable_aggregation/cuda.cu",
        "(total[i] + (top[i] - top[i]))",
        "total[i]",
        "deformable_aggregation",
        (POSITIONS,),
    ),
    Mutant(
        "last pixels of a strip lost",
        "deformable_aggregation/cuda.cu",
        "pixel < minimum(pixels, (strip + 1) * kStrip)",
        "pixel < minimum(pixels - 1, (strip + 1) * kStrip)",
        "deformable_aggregation",
    ),
    Mutant(
        "softmax over a window not divided",
        "common/device_windows.h",
        "const A scale = 1 / sum[0];",
        "const A scale = 1;",
        "window_pool",
    ),
    Mutant(
        "heads of the last group are the first's",
        "common/device_windows.h",
        "write(out.at(b, window, head + m, c), row);",
        "write(out.at(b, window, m, c), row);",
        "window_pool",
    ),
    Mutant(
        "row of the patch one off",
        "correlation_lookup/cuda.cu",
        "[(y - j + lookup.n - 1) * lists.columns + x - i + lookup.n - 1]",
        "[(y - j + lookup.n - 1) * lists.columns + x - i + lookup.n]",
        "correlation_lookup",
    ),
    Mutant(
        "volume's gradient only where a pack begins in the window",
        "correlation_lookup/cuda.cu",
        "const i64 last = x + V <= size.width ? y : size.height;",
        "const i64 last = y;",
        "correlation_lookup",
    ),
    Mutant(
        "rim pixels of the lanes before forgotten",
        "complete_flow/cuda.cu",
        "wanted -= team.before(own);",
        "team.before(own);",
        "complete_flow",
    ),
    Mutant(
        "mean of the upsampling weights' gradient left out",
        "convex_upsample/cuda.cu",
        "* from.value[1][k] - mean[v])",
        "* from.value[1][k])",
        "convex_upsample",
    ),
    Mutant(
        "half of the consistency",
        "flow_consistency/cuda.cu",
        "Rounded<T>::from(sum / 2)",
        "Rounded<T>::from(sum)",
        "flow_consistency",
    ),
)
