// A few tokens, each of another text, through one decoder block of the common kind: norm, q, k and v, rotation, attention,
// o, norm, gate and up, down, with what came in added to either half. All rows are of one type and lie one after another.
#pragma once
#include "matrix.h"

namespace prunus {

// Up to the attention: `out` are queries, keys and values, each batch x heads x head_width.
struct Projection {
  int32_t type;
  int64_t batch, width, head_width;
  const void *hidden, *cos, *sin;  // batch x width; batch x head_width, or the same for all
  int64_t angles;                  // from one text's cos to the next one's: head_width, or 0
  Norm norm, query_norm, key_norm;
  Matrix matrices[3];   // q, k, v
  const void* bias[3];  // of the type of the rows, or null
  void* out[3];
};

// From the attention on: `out` is what the block returns, batch x width.
struct Completion {
  int32_t type;
  int64_t batch, width;
  const void *hidden, *attended;
  Norm norm;
  Matrix matrices[4];  // o, gate, up, down
  const void* bias[4];
  void* out;
};

void project(const Kernels& code, const Projection& projection, int threads);
void complete(const Kernels& code, const Completion& completion, int threads);

}  // namespace prunus
