#include "inputs.h"

#include <cstring>

namespace prunus {

PreparedInputs::PreparedInputs(const Given& given, bool for_bfloat16, bool for_int8, const Kernels& code)
    : stride_((given.columns + kGroup - 1) / kGroup * kGroup), batch_(given.batch) {
  const bool as_given = for_bfloat16 && code.has_bfloat16 && given.type == kBfloat16;
  keeps_float32_ = for_bfloat16 && !as_given;
  if (as_given) {
    bfloat16_.reset(new uint16_t[batch_ * stride_]);
    for (int64_t b = 0; b < batch_; ++b)
      std::memcpy(padded(bfloat16_.get(), b, given.columns), row(given, b), given.columns * sizeof(uint16_t));
  }
  if (keeps_float32_ || for_int8) widen(given, code);
  if (for_int8) {
    const int64_t groups = batch_ * stride_ / kGroup;
    rounded_.reset(new int8_t[batch_ * stride_]);
    scale_.reset(new float[groups]);
    offset_.reset(new uint32_t[batch_ * stride_ / kTile + 1]);
    code.rows.round(float32_.get(), groups, rounded_.get(), scale_.get(), offset_.get());
  }
}

void PreparedInputs::widen(const Given& given, const Kernels& code) {
  float32_.reset(new float[batch_ * stride_]);
  for (int64_t b = 0; b < batch_; ++b) {
    float* to = padded(float32_.get(), b, given.columns);
    if (given.type == kFloat32)
      std::memcpy(to, row(given, b), given.columns * sizeof(float));
    else
      code.rows.widen(static_cast<const uint16_t*>(row(given, b)), given.columns, to);
  }
}

const void* PreparedInputs::row(const Given& given, int64_t b) {
  const int64_t size = given.type == kFloat32 ? sizeof(float) : sizeof(uint16_t);
  return static_cast<const char*>(given.values) + b * given.columns * size;
}

Inputs PreparedInputs::inputs() const {
  return {bfloat16_.get(), keeps_float32_ ? float32_.get() : nullptr, rounded_.get(), scale_.get(), offset_.get(),
          stride_};
}

}  // namespace prunus
