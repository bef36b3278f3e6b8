#if defined(__x86_64__)
#define PRUNUS_TARGET "avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl"
#include "target.h"

#include "portable.inl"

namespace prunus {
const Kernels avx512_kernels = {"avx512", false, product, expand};
}
#include "target_end.h"
#endif
