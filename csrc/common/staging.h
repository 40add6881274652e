// Moving blocks of a strided map [channels, height, width] to and from a "slab": pixels in row-major
// order, each with its channels contiguous in accumulation type, padded to whole vectors. Kernels
// gather from slabs; channels-last float maps are used in place and need none.
#pragma once

#include <cstdlib>
#include <new>

#include "common/simd.h"

GI_BEGIN_VARIANT

// Large blocks that a thread's scratch leaves behind, for what comes next: of the system they would be fresh
// memory, which it clears page by page, and that can take as long as a kernel does.
class LeftScratch {
 public:
  struct Block {
    void* data = nullptr;
    i64 bytes = 0;
  };

  ~LeftScratch() {
    for (int i = 0; i < count_; ++i) std::free(blocks_[i].data);
  }

  // A block of at least `bytes`, and not of much more; none if there is none.
  Block take(i64 bytes) {
    for (int i = count_; i-- > 0;) {
      const Block block = blocks_[i];
      if (block.bytes < bytes || block.bytes > 2 * bytes) continue;
      remove(i);
      return block;
    }
    return {};
  }

  void leave(const Block& block) {
    if (block.bytes < kLeast || block.bytes > kMost) return std::free(block.data);
    while (count_ == kBlocks || bytes_ + block.bytes > kMost) {
      std::free(blocks_[0].data);
      remove(0);
    }
    blocks_[count_++] = block;
    bytes_ += block.bytes;
  }

 private:
  static constexpr int kBlocks = 8;
  static constexpr i64 kLeast = i64(64) << 10;  // of one block
#if defined(__SANITIZE_ADDRESS__)
  static constexpr i64 kMost = 0;  // none: in a larger block than was asked for a fault is not seen
#else
  static constexpr i64 kMost = i64(4) << 20;  // of all together
#endif

  Block blocks_[kBlocks];  // in the order in which they were left
  int count_ = 0;
  i64 bytes_ = 0;

  void remove(int i) {
    bytes_ -= blocks_[i].bytes;
    for (--count_; i < count_; ++i) blocks_[i] = blocks_[i + 1];
  }
};

inline thread_local LeftScratch left_scratch;

// Uninitialised memory of one worker, aligned to vectors.
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(i64 bytes) { reserve(bytes); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { left_scratch.leave(block_); }

  void reserve(i64 bytes) {
    if (bytes <= block_.bytes) return;
    left_scratch.leave(block_);
    block_ = left_scratch.take(bytes);
    if (block_.data) return;
    block_ = {std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64)), bytes};
    if (block_.data) return;
    block_ = {};
    throw std::bad_alloc();
  }
  template <class T> T* as() const { return static_cast<T*>(block_.data); }

 private:
  LeftScratch::Block block_;
};

template <class A> GI_HOST_DEVICE i64 padded(i64 channels) {
  return (channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A strided map of one image: element (c, y, x) is at c*sc + y*sy + x*sx.
template <class T> struct Plane {
  T* data;
  i64 sc, sy, sx;
};

// Slab row of `pixels` pixels <- a row of the map: channels [0, channels) at stride sc, pixels at
// stride sx. Padding channels become zero.
template <class A, class T>
inline void stage_row(const T* source, i64 sc, i64 sx, i64 channels, i64 pixels, A* slab, i64 slab_stride) {
  constexpr int L = kLanes<A>;
  if (sc == 1) {
    for (i64 p = 0; p < pixels; ++p, source += sx, slab += slab_stride) {
      i64 c = 0;
      for (; c + L <= channels; c += L) store<A>(slab + c, load<A>(source + c));
      for (; c < channels; ++c) slab[c] = to_accumulate(source[c]);
      for (; c < slab_stride; ++c) slab[c] = 0;
    }
    return;
  }
  for (i64 c = 0; c < slab_stride; c += L) {
    const i64 valid = minimum<i64>(L, channels - c);
    i64 p = 0;
    if (sx == 1) {
      for (; p + L <= pixels; p += L) {
        Vec<A> block[L];
        for (int i = 0; i < L; ++i)
          block[i] = i < valid ? load<A>(source + (c + i) * sc + p) : splat<A>(0);
        transpose<A>(block);
        for (int i = 0; i < L; ++i) store<A>(slab + (p + i) * slab_stride + c, block[i]);
      }
    }
    for (; p < pixels; ++p)
      for (int i = 0; i < L; ++i)
        slab[p * slab_stride + c + i] = i < valid ? to_accumulate(source[(c + i) * sc + p * sx]) : A(0);
  }
}

// A row of the map <- slab row: the inverse of stage_row; padding is left behind.
template <class A, class T>
inline void unstage_row(const A* slab, i64 slab_stride, i64 channels, i64 pixels, T* target, i64 sc, i64 sx) {
  constexpr int L = kLanes<A>;
  if (sc == 1) {
    for (i64 p = 0; p < pixels; ++p, target += sx, slab += slab_stride) {
      i64 c = 0;
      for (; c + L <= channels; c += L) store<A>(target + c, load<A>(slab + c));
      for (; c < channels; ++c) target[c] = Rounded<T>::from(slab[c]);
    }
    return;
  }
  for (i64 c = 0; c < channels; c += L) {
    const i64 valid = minimum<i64>(L, channels - c);
    i64 p = 0;
    if (sx == 1) {
      for (; p + L <= pixels; p += L) {
        Vec<A> block[L];
        for (int i = 0; i < L; ++i) block[i] = load<A>(slab + (p + i) * slab_stride + c);
        transpose<A>(block);
        for (int i = 0; i < valid; ++i) store<A>(target + (c + i) * sc + p, block[i]);
      }
    }
    for (; p < pixels; ++p)
      for (int i = 0; i < valid; ++i)
        target[(c + i) * sc + p * sx] = Rounded<T>::from(slab[p * slab_stride + c + i]);
  }
}

// All rows of a map, or rows [y0, y1) of it.
template <class A, class T>
inline void stage(const Plane<const T>& map, i64 channels, i64 y0, i64 y1, i64 width, A* slab, i64 slab_stride) {
  // Rows that follow each other without a gap are one long row.
  if (map.sy == width * map.sx) {
    stage_row<A, T>(map.data + y0 * map.sy, map.sc, map.sx, channels, (y1 - y0) * width, slab, slab_stride);
    return;
  }
  for (i64 y = y0; y < y1; ++y, slab += width * slab_stride)
    stage_row<A, T>(map.data + y * map.sy, map.sc, map.sx, channels, width, slab, slab_stride);
}

template <class A, class T>
inline void unstage(const A* slab, i64 slab_stride, i64 channels, i64 y0, i64 y1, i64 width, const Plane<T>& map) {
  if (map.sy == width * map.sx) {
    unstage_row<A, T>(slab, slab_stride, channels, (y1 - y0) * width, map.data + y0 * map.sy, map.sc, map.sx);
    return;
  }
  for (i64 y = y0; y < y1; ++y, slab += width * slab_stride)
    unstage_row<A, T>(slab, slab_stride, channels, width, map.data + y * map.sy, map.sc, map.sx);
}

GI_END_VARIANT
