// Everything from here to target_end.h may use the instructions that PRUNUS_TARGET names. In the source and not among
// the compiler's options, so that every builder can build it. Standard headers come before: what they define inline must
// run on any processor.
#include <cmath>
#include <cstdint>

#define PRUNUS_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define PRUNUS_USE(names) PRUNUS_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#else
#define PRUNUS_USE(names) PRUNUS_PRAGMA(GCC push_options) PRUNUS_PRAGMA(GCC target(names))
#endif
PRUNUS_USE(PRUNUS_TARGET)
