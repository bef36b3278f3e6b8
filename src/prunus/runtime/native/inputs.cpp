#include "inputs.h"

#include <algorithm>
#include <cstring>

#include "numbers.h"

namespace prunus {
namespace {

// The largest of kGroup absolute values. As whole numbers floats compare as they do otherwise, and NaN is above
// infinity: a group with NaN has the scale NaN, and so have the products it is part of.
float largest_of(const float* values) {
  int32_t largest = 0;
  for (int i = 0; i < kGroup; ++i) {
    int32_t bits;
    std::memcpy(&bits, &values[i], sizeof bits);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float value;
  std::memcpy(&value, &largest, sizeof value);
  return value;
}

// To the nearest, ties to even, without asking the processor how it rounds: adding 1.5 * 2^23 leaves the whole part.
int8_t code_of(float multiple) {
  const float shifted = multiple + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return static_cast<int8_t>(bits - 0x4b400000);
}

}  // namespace

PreparedInputs::PreparedInputs(const Given& given, bool for_bfloat16, bool for_int8, bool has_bfloat16)
    : stride_((given.columns + kGroup - 1) / kGroup * kGroup), batch_(given.batch) {
  const bool as_given = for_bfloat16 && has_bfloat16 && given.type == kBfloat16;
  keeps_float32_ = for_bfloat16 && !as_given;
  if (as_given) {
    bfloat16_.assign(batch_ * stride_, 0);
    for (int64_t b = 0; b < batch_; ++b)
      std::memcpy(&bfloat16_[b * stride_], static_cast<const uint16_t*>(given.values) + b * given.columns,
                  given.columns * sizeof(uint16_t));
  }
  if (keeps_float32_ || for_int8) widen(given);
  if (for_int8) round();
}

void PreparedInputs::widen(const Given& given) {
  float32_.assign(batch_ * stride_, 0.0f);
  for (int64_t b = 0; b < batch_; ++b) {
    float* to = &float32_[b * stride_];
    if (given.type == kFloat32) {
      std::memcpy(to, static_cast<const float*>(given.values) + b * given.columns, given.columns * sizeof(float));
      continue;
    }
    const uint16_t* from = static_cast<const uint16_t*>(given.values) + b * given.columns;
    for (int64_t i = 0; i < given.columns; ++i) to[i] = widened(from[i]);
  }
}

void PreparedInputs::round() {
  rounded_.resize(batch_ * stride_);
  scale_.resize(batch_ * stride_ / kGroup);
  for (int64_t group = 0; group < batch_ * stride_ / kGroup; ++group) {
    const float* from = &float32_[group * kGroup];
    const float largest = largest_of(from);
    const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
    int8_t* to = &rounded_[group * kGroup];
    for (int i = 0; i < kGroup; ++i) to[i] = code_of(from[i] * inverse);
    scale_[group] = largest / 127.0f;
  }
  offset_.resize(batch_ * stride_ / kTile);
  for (int64_t tile = 0; tile < batch_ * stride_ / kTile; ++tile) {
    int32_t sum = 0;
    for (int i = 0; i < kTile; ++i) sum += rounded_[tile * kTile + i];
    offset_[tile] = 128 * sum;
  }
}

Inputs PreparedInputs::inputs() const {
  return {bfloat16_.empty() ? nullptr : bfloat16_.data(), keeps_float32_ ? float32_.data() : nullptr,
          rounded_.empty() ? nullptr : rounded_.data(), scale_.empty() ? nullptr : scale_.data(),
          offset_.empty() ? nullptr : offset_.data(), stride_};
}

}  // namespace prunus
