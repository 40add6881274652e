// The torch side of a device kernel.
#pragma once

#include "common/binding.h"
#include "common/device.h"

#if defined(GI_EMULATE_CUDA)
// The kernels' bodies run on the CPU, in place of the CPU kernels.
#define GI_DEVICE_KEY CPU
#else
#define GI_DEVICE_KEY CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace gi {

// For as long as it lives, the device of its tensors is the current one. Gives the stream to launch on.
class DeviceScope {
 public:
  explicit DeviceScope(std::initializer_list<at::TensorList> tensors) : device_(device_of(tensors)) {}

#if defined(GI_EMULATE_CUDA)
  Stream stream() const { return {nullptr}; }
#else
  Stream stream() const { return {c10::cuda::getCurrentCUDAStream(device_.index()).stream()}; }
#endif

 private:
  // Public functions have checked this; calls of torch.ops have not been.
  static c10::Device device_of(std::initializer_list<at::TensorList> lists) {
    const at::Tensor* first = nullptr;
    for (const at::TensorList& list : lists)
      for (const at::Tensor& t : list) {
        if (!first) first = &t;
        TORCH_CHECK_VALUE(t.device() == first->device(), "expected all tensors on ", first->device(), ", got one on ",
                          t.device());
      }
    return first->device();
  }

  c10::Device device_;
#if !defined(GI_EMULATE_CUDA)
  c10::cuda::CUDAGuard guard_{device_};
#endif
};

// An uninitialised gradient with the layout of `t`, or with no element where none is wanted.
inline at::Tensor device_gradient(const at::Tensor& t, bool wanted) {
  return wanted ? at::empty_like(t) : at::empty({0}, t.options());
}

inline at::Tensor contiguous_device_gradient(const at::Tensor& t, bool wanted) {
  return at::empty(wanted ? t.sizes() : at::IntArrayRef{0}, t.options());
}

// Uninitialised memory that kernels work with.
inline at::Tensor device_memory(i64 bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte));
}

}  // namespace gi
