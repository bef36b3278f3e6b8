// Inputs of a product, brought into the forms that kernels read.
#pragma once
#include <vector>

#include "matrix.h"

namespace prunus {

// Rows of `columns` inputs, bfloat16 or fp32, one after another.
struct Given {
  const void* values;
  Type type;
  int64_t batch, columns;
};

// Owns what `Inputs` points at. Made once for a product, read by all threads.
class PreparedInputs {
 public:
  PreparedInputs(const Given& given, bool for_bfloat16, bool for_int8, bool has_bfloat16);
  Inputs inputs() const;

 private:
  void widen(const Given& given);
  void round();

  int64_t stride_;
  int64_t batch_;
  std::vector<uint16_t> bfloat16_;
  std::vector<float> float32_, scale_;
  std::vector<int8_t> rounded_;
  std::vector<int32_t> offset_;
  bool keeps_float32_;
};

}  // namespace prunus
