// The steps of rows.h in the compiler's own vectors.
#include "lanes.inl"
#include "matrix.h"
#include "rows.h"

namespace prunus {
namespace {

template <class Value>
inline float rounded(float value) {
  Value narrow;
  set(&narrow, value);
  return number(narrow);
}

template <class Value>
void norm_row(const Value* row, const Norm& norm, int64_t width, Value* out) {
  const Value* weight = static_cast<const Value*>(norm.weight);
  const int64_t whole = width / kLanes * kLanes;
  Lanes squares = {}, numbers;
  for (int64_t i = 0; i < whole; i += kLanes) {
    load(row + i, numbers);
    squares += numbers * numbers;
  }
  float sum = sum_of(squares);
  for (int64_t i = whole; i < width; ++i) sum += number(row[i]) * number(row[i]);
  const float factor = 1 / __builtin_sqrtf(sum / static_cast<float>(width) + norm.epsilon);
  for (int64_t i = 0; i < width; ++i) set(out + i, rounded<Value>(number(row[i]) * factor) * number(weight[i]));
}

template <class Value>
void rotate_row(Value* row, const Value* cos, const Value* sin, int64_t width) {
  const int64_t half = width / 2;
  Value *const first = row, *const second = row + half;
  for (int64_t i = 0; i < half; ++i) {
    const float one = number(first[i]), other = number(second[i]);
    set(first + i, rounded<Value>(one * number(cos[i])) - rounded<Value>(other * number(sin[i])));
    set(second + i, rounded<Value>(other * number(cos[half + i])) + rounded<Value>(one * number(sin[half + i])));
  }
}

// e^-|x| never overflows: silu is x / (1 + e^-x), and x e^x / (1 + e^x) below zero.
inline Lanes silu(const Lanes& x) {
  const Lanes small = exponential(x < 0 ? x : -x);
  return x * (x < 0 ? small : Lanes{} + 1.0f) / (small + 1.0f);
}

// Up to kLanes numbers, in memory whose size the compiler knows.
template <class Value>
inline void take(const Value* from, int count, Value (&to)[kLanes]) {
  if (count == kLanes)
    __builtin_memcpy(to, from, sizeof to);
  else
    for (int i = 0; i < kLanes; ++i) to[i] = i < count ? from[i] : Value{};
}

template <class Value>
void gate_row(const Value* gate, const Value* up, int64_t count, Value* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int some = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    Value one[kLanes], other[kLanes];
    take(gate + first, some, one);
    take(up + first, some, other);
    Lanes lanes;
    load(one, lanes);
    lanes = silu(lanes);
    float numbers[kLanes];
    __builtin_memcpy(numbers, &lanes, sizeof numbers);
    for (int i = 0; i < kLanes; ++i) set(one + i, rounded<Value>(numbers[i]) * number(other[i]));
    if (some == kLanes)
      __builtin_memcpy(out + first, one, sizeof one);
    else
      for (int i = 0; i < some; ++i) out[first + i] = one[i];
  }
}

template <class Value>
void add_rows(const Value* one, const Value* other, int64_t count, Value* out) {
  for (int64_t i = 0; i < count; ++i) set(out + i, number(one[i]) + number(other[i]));
}

// The largest of kGroup absolute values. As whole numbers floats compare as they do otherwise, and NaN is above
// infinity: a group with NaN has the scale NaN, and so have the products it is part of.
inline float largest_of_group(const float* values) {
  int32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) {
    const int32_t bits = read<int32_t>(values + i) & 0x7fffffff;
    largest = largest < bits ? bits : largest;
  }
  return read<float>(&largest);
}

// To the nearest, ties to even, without asking the processor how it rounds: adding 1.5 * 2^23 leaves the whole part.
inline int8_t code_of(float multiple) {
  const float shifted = multiple + 12582912.0f;
  return static_cast<int8_t>(read<int32_t>(&shifted) - 0x4b400000);
}

inline void round_groups(const float* numbers, int64_t groups, int8_t* codes, float* scale, uint32_t* offset) {
  uint32_t before = 0;  // it may run over: differences stay right
  *offset++ = 0;
  for (int64_t group = 0; group < groups; ++group, numbers += kGroup, codes += kGroup) {
    const float largest = largest_of_group(numbers), inverse = largest > 0 ? 127.0f / largest : 0.0f;
    for (int i = 0; i < kGroup; ++i) codes[i] = code_of(numbers[i] * inverse);
    *scale++ = largest / 127.0f;
    for (int tile = 0; tile < kGroup; tile += kTile) {
      int32_t sum = 0;
      for (int i = 0; i < kTile; ++i) sum += codes[tile + i];
      *offset++ = before += 128 * static_cast<uint32_t>(sum);
    }
  }
}

void widen(const uint16_t* bfloat16, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = widened(bfloat16[i]);
}

// The same place, as numbers of a type.
template <class Value>
inline Value* typed(void* pointer) { return static_cast<Value*>(pointer); }
template <class Value>
inline const Value* typed(const void* pointer) { return static_cast<const Value*>(pointer); }

template <class Value>
constexpr RowSteps steps_of = {
    [](const void* row, const Norm& norm, int64_t width, void* out) {
      norm_row(typed<Value>(row), norm, width, typed<Value>(out));
    },
    [](void* row, const void* cos, const void* sin, int64_t width) {
      rotate_row(typed<Value>(row), typed<Value>(cos), typed<Value>(sin), width);
    },
    [](const void* gate, const void* up, int64_t count, void* out) {
      gate_row(typed<Value>(gate), typed<Value>(up), count, typed<Value>(out));
    },
    [](const void* one, const void* other, int64_t count, void* out) {
      add_rows(typed<Value>(one), typed<Value>(other), count, typed<Value>(out));
    },
};

constexpr TokenSteps rows = {steps_of<uint16_t>, steps_of<float>, round_groups, widen};

}  // namespace
}  // namespace prunus
