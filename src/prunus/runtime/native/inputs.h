// Inputs of a product, brought into the forms that kernels read.
#pragma once
#include <algorithm>
#include <memory>

#include "matrix.h"

namespace prunus {

// Rows of `columns` inputs, bfloat16 or fp32, one after another.
struct Given {
  const void* values;
  Type type;
  int64_t batch, columns;
};

// Owns what `Inputs` points at. Made once for a product, read by all threads. Rows end in zeros, to a whole kGroup.
class PreparedInputs {
 public:
  PreparedInputs(const Given& given, bool for_bfloat16, bool for_int8, const Kernels& code);
  Inputs inputs() const;

 private:
  void widen(const Given& given, const Kernels& code);
  static const void* row(const Given& given, int64_t b);
  template <class Value>
  Value* padded(Value* rows, int64_t b, int64_t columns) const {
    std::fill(rows + b * stride_ + columns, rows + (b + 1) * stride_, Value{});
    return rows + b * stride_;
  }

  int64_t stride_;
  int64_t batch_;
  std::unique_ptr<uint16_t[]> bfloat16_;
  std::unique_ptr<float[]> float32_, scale_;
  std::unique_ptr<int8_t[]> rounded_;
  std::unique_ptr<uint32_t[]> offset_;
  bool keeps_float32_;
};

}  // namespace prunus
