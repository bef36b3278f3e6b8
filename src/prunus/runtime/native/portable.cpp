#include "portable.inl"

namespace prunus {
const Kernels portable_kernels = {"portable", false, product, expand};
}
