// Numbers that lie at any byte; and bfloat16, the upper half of a float.
#pragma once
#include <cstdint>

namespace prunus {
namespace {  // each file has its own: they are compiled for different processors

template <class To>
inline To read(const void* from) {
  To value;
  __builtin_memcpy(&value, from, sizeof(To));
  return value;
}

inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t narrowed(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

}  // namespace
}  // namespace prunus
