#if defined(__aarch64__)
#include "attention.inl"
#include "rows.inl"
#include "neon.inl"

namespace prunus {
const Kernels neon_kernels = {"neon", false, product, expand, attend, rows};
}
#endif
