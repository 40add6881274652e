// Uninitialised tensors for results. Touching fresh memory would cost more than a kernel's own work:
// the system clears it first, one small page at a time. So memory of large results is aligned to huge
// pages, on which it is put where the system leaves that choice to programs, and is kept for the next
// result of the same size when a result is freed.
#pragma once

#include <cstdlib>
#include <limits>
#include <mutex>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gi {

class ResultMemory final : public c10::Allocator {
 public:
  static constexpr size_t kHugePage = size_t(2) << 20;
  static constexpr size_t kLarge = 2 * kHugePage;         // least size of a large result
  static constexpr size_t kMostKept = size_t(256) << 20;    // of all freed blocks together

  // Never destroyed: results may be freed while the process ends.
  static ResultMemory& instance() {
    static auto* memory = new ResultMemory;
    return *memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return c10::GetCPUAllocator()->allocate(bytes);
    Block block{nullptr, (bytes + kHugePage - 1) / kHugePage * kHugePage};
    if (!take(block)) {
      block.data = std::aligned_alloc(kHugePage, block.bytes);
      if (!block.data) {
        c10::profiledCPUMemoryReporter().OutOfMemory(bytes);
        TORCH_CHECK_WITH(OutOfMemoryError, false, "not enough memory: you tried to allocate ", bytes, " bytes.");
      }
      advise(block, Advice::huge_pages);
    }
    c10::profiledCPUMemoryReporter().New(block.data, bytes);
    return {block.data, new Block(block), release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  enum class Advice { huge_pages, reclaimable };

  std::mutex mutex_;
  std::vector<Block> kept_;  // in the order in which they were freed
  size_t kept_bytes_ = 0;

  static void advise([[maybe_unused]] const Block& block, [[maybe_unused]] Advice advice) {
#if defined(__linux__)
    madvise(block.data, block.bytes, advice == Advice::huge_pages ? MADV_HUGEPAGE : MADV_FREE);
#endif
  }

  static void release(void* context) {
    Block* block = static_cast<Block*>(context);
    c10::profiledCPUMemoryReporter().Delete(block->data);
    instance().keep(*block);
    delete block;
  }

  // Gives `block` the memory of the kept one of its size that was freed last, if there is one. The lock
  // is only tried: a process forked while another thread held it would wait for ever.
  bool take(Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    for (size_t i = kept_.size(); i-- > 0;) {
      if (kept_[i].bytes != block.bytes) continue;
      block = kept_[i];
      kept_.erase(kept_.begin() + i);
      kept_bytes_ -= block.bytes;
      return true;
    }
    return false;
  }

  void keep(const Block& block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kMostKept) return std::free(block.data);
    advise(block, Advice::reclaimable);  // the system may take the pages back until they are written again
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
    while (kept_bytes_ > kMostKept) {
      kept_bytes_ -= kept_.front().bytes;
      std::free(kept_.front().data);
      kept_.erase(kept_.begin());
    }
  }
};

// As at::empty and at::empty_like make them, full of NaN where that is asked for.
inline at::Tensor filled_if_asked(at::Tensor t) {
  const auto& context = at::globalContext();
  if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
    t.fill_(std::numeric_limits<double>::quiet_NaN());
  return t;
}

inline at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options,
                               at::MemoryFormat format = at::MemoryFormat::Contiguous) {
  return filled_if_asked(at::Tensor(at::detail::empty_generic(
      sizes, &ResultMemory::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU),
      c10::typeMetaToScalarType(options.dtype()), format)));
}

inline at::Tensor empty_result_like(const at::Tensor& t) {
  const bool dense = t.is_non_overlapping_and_dense();
  return filled_if_asked(at::Tensor(at::detail::empty_strided_generic(
      t.sizes(), dense ? t.strides().vec() : at::infer_dense_strides(t.sizes(), t.strides()),
      &ResultMemory::instance(), c10::DispatchKeySet(c10::DispatchKey::CPU), t.scalar_type())));
}

}  // namespace gi
