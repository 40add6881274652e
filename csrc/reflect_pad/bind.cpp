// Padding of channels-last maps by reflection: rows and pixels are copied as they are, whatever their type.
#include <cstring>

#include "common/binding.h"

namespace gi {
namespace {

// Where padded line `i` comes from, of `length` lines.
i64 mirrored(i64 i, i64 length) { return i < 0 ? -i : i < length ? i : 2 * (length - 1) - i; }

at::Tensor reflect_pad(const at::Tensor& x, i64 margin) {
  const i64 B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3), height = H + 2 * margin, width = W + 2 * margin;
  TORCH_CHECK_VALUE(margin >= 0 && margin < H && margin < W, "margin: expected less than the ", H, " x ", W,
                    " pixels of x, got ", margin);
  const at::Tensor padded = empty_result({B, C, height, width}, x.options(), at::MemoryFormat::ChannelsLast);
  if (padded.numel() == 0) return padded;
  const at::Tensor map = x.contiguous(at::MemoryFormat::ChannelsLast);
  const i64 pixel = C * i64(x.element_size());
  const char* from = static_cast<const char*>(map.const_data_ptr());
  char* to = static_cast<char*>(padded.data_ptr());
  at::parallel_for(0, B * height, 1, [&](i64 begin, i64 end) {
    for (i64 i = begin; i < end; ++i) {
      const char* row = from + (i / height * H + mirrored(i % height - margin, H)) * W * pixel;
      char* out = to + i * width * pixel;
      std::memcpy(out + margin * pixel, row, W * pixel);
      for (i64 x = 0; x < margin; ++x) {
        std::memcpy(out + x * pixel, row + mirrored(x - margin, W) * pixel, pixel);
        std::memcpy(out + (margin + W + x) * pixel, row + mirrored(W + x, W) * pixel, pixel);
      }
    }
  });
  return padded;
}

}  // namespace

TORCH_LIBRARY_IMPL(gi, CPU, m) { m.impl("reflect_pad", reflect_pad); }

}  // namespace gi
