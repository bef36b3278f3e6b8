// The compiler's own vectors, of PRUNUS_LANES numbers: included where a processor's instructions may be used.
#pragma once
#include "numbers.h"

#if !defined(PRUNUS_LANES)
#define PRUNUS_LANES 4
#endif

namespace prunus {
namespace {

constexpr int kLanes = PRUNUS_LANES;  // of one register: of more the compiler makes detours through memory

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

inline void load(const float* from, Lanes& to) { __builtin_memcpy(&to, from, sizeof to); }
inline void load(const uint16_t* from, Lanes& to) {
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  const Words bits = __builtin_convertvector(halves, Words) << 16;
  __builtin_memcpy(&to, &bits, sizeof to);
}

template <class Join>
inline float joined(const Lanes& lanes, Join join) {
  float values[kLanes];
  __builtin_memcpy(values, &lanes, sizeof values);
  for (int width = kLanes / 2; width; width /= 2)
    for (int l = 0; l < width; ++l) values[l] = join(values[l], values[l + width]);
  return values[0];
}

inline float sum_of(const Lanes& lanes) {
  return joined(lanes, [](float a, float b) { return a + b; });
}
inline float largest_of(const Lanes& lanes) {
  return joined(lanes, [](float a, float b) { return a > b ? a : b; });
}

inline float number(float value) { return value; }
inline float number(uint16_t value) { return widened(value); }
inline void set(float* to, float value) { *to = value; }
inline void set(uint16_t* to, float value) { *to = narrowed(value); }

// e^x for x <= 0: 2^n times the Taylor polynomial of what is left, at most log(2) / 2, whose first term left out is 1.2e-7.
// 0 below e^-87, where fp32 runs out of exponents; NaN stays NaN.
inline Lanes exponential(const Lanes& x) {
  const Lanes shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the whole part is in the low bits
  const Lanes whole = shifted - 12582912.0f;
  const Lanes r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Lanes power = r * (1.0f / 720) + 1.0f / 120;
  power = power * r + 1.0f / 24;
  power = power * r + 1.0f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  const Words bits = ((Words)shifted - 0x4b400000 + 127) << 23;
  return x < -87.0f ? Lanes{} : power * (Lanes)bits;
}

}  // namespace
}  // namespace prunus
