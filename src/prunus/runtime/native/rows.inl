// The steps of rows.h in the compiler's own vectors.
#include "lanes.inl"
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

template <class Value>
void gate_row(const Value* gate, const Value* up, int64_t count, Value* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const int some = static_cast<int>(count - first < kLanes ? count - first : kLanes);
    float numbers[kLanes] = {};
    for (int i = 0; i < some; ++i) numbers[i] = number(gate[first + i]);
    Lanes lanes;
    load(numbers, lanes);
    lanes = silu(lanes);
    __builtin_memcpy(numbers, &lanes, sizeof numbers);
    for (int i = 0; i < some; ++i) set(out + first + i, rounded<Value>(numbers[i]) * number(up[first + i]));
  }
}

template <class Value>
void add_rows(const Value* one, const Value* other, int64_t count, Value* out) {
  for (int64_t i = 0; i < count; ++i) set(out + i, number(one[i]) + number(other[i]));
}

// The same place, as numbers of a type.
template <class Value>
inline Value* typed(void* pointer) { return static_cast<Value*>(pointer); }
template <class Value>
inline const Value* typed(const void* pointer) { return static_cast<const Value*>(pointer); }

constexpr RowSteps rows = {
    [](Type type, const void* row, const Norm& norm, int64_t width, void* out) {
      if (type == kFloat32)
        norm_row(typed<float>(row), norm, width, typed<float>(out));
      else
        norm_row(typed<uint16_t>(row), norm, width, typed<uint16_t>(out));
    },
    [](Type type, void* row, const void* cos, const void* sin, int64_t width) {
      if (type == kFloat32)
        rotate_row(typed<float>(row), typed<float>(cos), typed<float>(sin), width);
      else
        rotate_row(typed<uint16_t>(row), typed<uint16_t>(cos), typed<uint16_t>(sin), width);
    },
    [](Type type, const void* gate, const void* up, int64_t count, void* out) {
      if (type == kFloat32)
        gate_row(typed<float>(gate), typed<float>(up), count, typed<float>(out));
      else
        gate_row(typed<uint16_t>(gate), typed<uint16_t>(up), count, typed<uint16_t>(out));
    },
    [](Type type, const void* one, const void* other, int64_t count, void* out) {
      if (type == kFloat32)
        add_rows(typed<float>(one), typed<float>(other), count, typed<float>(out));
      else
        add_rows(typed<uint16_t>(one), typed<uint16_t>(other), count, typed<uint16_t>(out));
    },
};

}  // namespace
}  // namespace prunus
