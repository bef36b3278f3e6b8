// Instruction sets, each with kernels of its own; the best that this processor has is used until another one is asked for.
#pragma once
#include "matrix.h"

namespace prunus {

const Kernels& kernels();

// The names of the levels that this processor has, best first; null behind the last.
const char* level_named(int index);

// False for a level that this processor has not.
bool use_level(const char* name);

}  // namespace prunus
