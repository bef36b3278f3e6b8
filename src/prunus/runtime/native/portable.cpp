// The same products in plain C++, for processors that none of the other files is for. A cell is unpacked into an array,
// then multiplied by each input.
#include <cmath>

#include "attention.inl"
#include "rows.inl"
#include "cells.h"
#include "matrix.h"
#include "numbers.h"

namespace prunus {
namespace {

struct Sums {
  float values[kMaxBatch][kStrip];
};

// weights[u][r] of the two columns from `column` on.
void add_floats(Sums& sums, const float (*weights)[kStrip], const Inputs& inputs, int batch, int64_t column) {
  for (int b = 0; b < batch; ++b) {
    const float* x = inputs.float32 + b * inputs.stride + column;
    for (int r = 0; r < kStrip; ++r) sums.values[b][r] += weights[0][r] * x[0] + weights[1][r] * x[1];
  }
}

void floats(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, Sums& sums) {
  Cells<uint16_t, 2> cells(m, strip);
  float weights[2][kStrip];
  while (cells.next()) {
    for (int r = 0; r < kStrip; ++r) {
      weights[0][r] = widened(cells.values[2 * r]);
      weights[1][r] = widened(cells.values[2 * r + 1]);
    }
    if (m.layout != kTwoOfFour) {
      add_floats(sums, weights, inputs, batch, cells.column);
      continue;
    }
    for (int b = 0; b < batch; ++b) {
      const float* x = inputs.float32 + b * inputs.stride + cells.column;
      for (int r = 0; r < kStrip; ++r)
        sums.values[b][r] += weights[0][r] * x[cells.places[2 * r]] + weights[1][r] * x[cells.places[2 * r + 1]];
    }
  }
}

void add_bytes(int32_t (*products)[kStrip], Cells<int8_t, 4>& cells, const Inputs& inputs, int batch, bool placed) {
  for (int b = 0; b < batch; ++b) {
    const int8_t* x = inputs.rounded + b * inputs.stride + cells.column;
    for (int r = 0; r < kStrip; ++r) {
      int32_t sum = 0;
      for (int u = 0; u < 4; ++u) {
        const int place = placed ? cells.places[4 * r + u] + (u / 2) * 4 : u;
        sum += cells.values[4 * r + u] * x[place];
      }
      products[b][r] += sum;
    }
  }
}

// Products are whole numbers until the scale of their inputs changes.
void bytes(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, Sums& sums) {
  Cells<int8_t, 4> cells(m, strip);
  int32_t products[kMaxBatch][kStrip] = {};
  int64_t run = -1;
  auto flush = [&] {
    for (int b = 0; run >= 0 && b < batch; ++b) {
      const float scale = inputs.scale[b * (inputs.stride / kGroup) + run];
      for (int r = 0; r < kStrip; ++r) {
        sums.values[b][r] = std::fma(static_cast<float>(products[b][r]), scale, sums.values[b][r]);
        products[b][r] = 0;
      }
    }
  };
  int64_t tile = -1;
  while (cells.next()) {
    // tiles add up alone, as in the other kernels: the same roundings, the same result
    const int64_t now = m.layout == kTiles ? cells.column / kTile : cells.column / kGroup;
    if (now != tile) flush();
    tile = now;
    run = cells.column / kGroup;
    add_bytes(products, cells, inputs, batch, m.layout == kTwoOfFour);
  }
  flush();
}

void product(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  Sums sums = {};
  if (m.type == kInt8)
    bytes(m, strip, inputs, batch, sums);
  else
    floats(m, strip, inputs, batch, sums);
  __builtin_memcpy(out, sums.values, sizeof(float) * kStrip * batch);
}

inline float weight_of(uint16_t value, const Matrix&, int64_t) { return widened(value); }
inline float weight_of(int8_t value, const Matrix& m, int64_t row) { return value * m.scale[row]; }

template <class Value, int kUnit>
void expand_in(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  const int64_t size = type == kFloat32 ? 4 : 2;
  if (m.layout == kTwoOfFour || m.layout == kTiles) __builtin_memset(out, 0, rows * m.columns * size);
  Cells<Value, kUnit> cells(m, strip);
  while (cells.next())
    for (int r = 0; r < rows; ++r)
      for (int u = 0; u < kUnit; ++u) {
        const Value value = cells.values[r * kUnit + u];
        const bool placed = m.layout == kTwoOfFour;
        const int64_t column = cells.column + (placed ? cells.places[r * kUnit + u] + u / 2 * 4 : u);
        if (column >= m.columns || (placed && value == 0)) continue;
        const float weight = weight_of(value, m, strip * kStrip + r);
        if (type == kFloat32)
          static_cast<float*>(out)[r * m.columns + column] = weight;
        else
          static_cast<uint16_t*>(out)[r * m.columns + column] = narrowed(weight);
      }
}

void expand(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  return (m.type == kInt8 ? expand_in<int8_t, 4> : expand_in<uint16_t, 2>)(m, strip, rows, type, out);
}

}  // namespace

const Kernels portable_kernels = {"portable", false, product, expand, attend, rows};

}  // namespace prunus
