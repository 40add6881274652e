// Choosing among the variants of a kernel table at run time.
#pragma once

namespace gi {

enum class Capability { portable, avx2, avx512, avx512_bf16 };

// The best instruction set of this CPU that was compiled in, or the one named by the environment
// variable GI_KERNELS_CPU_CAPABILITY (portable, avx2, avx512, avx512_bf16) where the CPU has it.
Capability cpu_capability();
const char* cpu_capability_name();

}  // namespace gi

// GI_DECLARE_KERNELS declares the table `name` of type `type` in every variant and a function
// `name##_for_this_cpu()`. Only tables declared by GI_DECLARE_PRODUCT_KERNELS have an avx512_bf16 variant,
// which differs in products of bfloat16 numbers.
#if defined(GI_X86_VARIANTS)
#define GI_DECLARE_KERNELS(type, name) GI_DECLARE_X86_KERNELS(type, name, avx512)
#define GI_DECLARE_X86_KERNELS(type, name, newest)                \
  namespace gi {                                                  \
  namespace portable { extern const type name; }                  \
  namespace avx2 { extern const type name; }                      \
  namespace avx512 { extern const type name; }                    \
  namespace newest { extern const type name; }                    \
  inline const type& name##_for_this_cpu() {                      \
    switch (cpu_capability()) {                                   \
      case Capability::avx512_bf16: return newest::name;          \
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

#if defined(GI_X86_BF16)
#define GI_DECLARE_PRODUCT_KERNELS(type, name) GI_DECLARE_X86_KERNELS(type, name, avx512_bf16)
#else
#define GI_DECLARE_PRODUCT_KERNELS(type, name) GI_DECLARE_KERNELS(type, name)
#endif
