// Choosing among the variants of a kernel table at run time.
#pragma once

namespace gi {

enum class Capability { portable, avx2, avx512 };

// The best instruction set of this CPU that was compiled in, or the one named by the environment
// variable GI_KERNELS_CPU_CAPABILITY (portable, avx2, avx512) where the CPU has it.
Capability cpu_capability();
const char* cpu_capability_name();

}  // namespace gi

// Declares the table `name` of type `type` in every variant and a function `name##_for_this_cpu()`.
#if defined(GI_X86_VARIANTS)
#define GI_DECLARE_KERNELS(type, name)                            \
  namespace gi {                                                  \
  namespace portable { extern const type name; }                  \
  namespace avx2 { extern const type name; }                      \
  namespace avx512 { extern const type name; }                    \
  inline const type& name##_for_this_cpu() {                      \
    switch (cpu_capability()) {                                   \
      case Capability::avx512: return avx512::name;               \
      case Capability::avx2: return avx2::name;                   \
      default: return portable::name;                             \
    }                                                             \
  }                                                               \
  }
#else
#define GI_DECLARE_KERNELS(type, name)                            \
  namespace gi {                                                  \
  namespace portable { extern const type name; }                  \
  inline const type& name##_for_this_cpu() { return portable::name; } \
  }
#endif
