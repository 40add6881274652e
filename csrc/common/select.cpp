#include "common/select.h"

#include <cstdlib>
#include <cstring>

namespace gi {

namespace {

const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

Capability detect() {
  Capability best = Capability::portable;
#if defined(GI_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = Capability::avx2;
  if (best == Capability::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = Capability::avx512;
#if defined(GI_X86_BF16)
  if (best == Capability::avx512 && __builtin_cpu_supports("avx512bf16")) best = Capability::avx512_bf16;
#endif
  if (const char* wanted = std::getenv("GI_KERNELS_CPU_CAPABILITY"))
    for (int i = 0; i <= static_cast<int>(best); ++i)
      if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<Capability>(i);
#endif
  return best;
}

}  // namespace

Capability cpu_capability() {
  static const Capability capability = detect();
  return capability;
}

const char* cpu_capability_name() { return kNames[static_cast<int>(cpu_capability())]; }

}  // namespace gi
