#if defined(__aarch64__)
#define PRUNUS_TARGET "arch=armv8.2-a+dotprod"
#define PRUNUS_DOT
#include "target.h"

#include "attention.inl"
#include "rows.inl"
#include "neon.inl"

namespace prunus {
const Kernels neon_dot_kernels = {"neon-dot", false, product, expand, attend, rows};
}
#include "target_end.h"
#endif
