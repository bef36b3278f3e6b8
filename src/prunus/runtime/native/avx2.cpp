#if defined(__x86_64__)
#define PRUNUS_TARGET "avx2,fma,bmi2,popcnt"
#include "target.h"

#include "portable.inl"

namespace prunus {
const Kernels avx2_kernels = {"avx2", false, product, expand};
}
#include "target_end.h"
#endif
