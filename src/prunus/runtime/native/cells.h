// The cells of a strip, one after another, in plain C++.
#pragma once
#include "matrix.h"

namespace prunus {
namespace {

template <class Value, int kUnit>
struct Cells {
  alignas(64) Value values[kStrip * kUnit];
  uint8_t places[kStrip * kUnit];  // 2:4 alone: which of its four columns each value belongs to
  int64_t column;

  Cells(const Matrix& m, int64_t strip) : column(-1), matrix(m), weight(static_cast<const Value*>(m.weight)) {
    const int64_t per_strip = m.layout == kTwoOfFour ? kept_cells_of(m) : cells_of(m);
    left = per_strip;
    place = static_cast<const uint8_t*>(m.index);
    if (m.layout == kBitmask) {
      weight += m.start[strip];
      place += strip * per_strip * (kStrip * kUnit / 8);
    } else if (m.layout == kTiles) {
      weight += m.start[strip] * kTile * kStrip;
      tile = static_cast<const int32_t*>(m.index) + m.start[strip];
      left = (m.start[strip + 1] - m.start[strip]) * (kTile / kUnit);
    } else {
      weight += strip * per_strip * kStrip * kUnit;
      place += m.layout == kTwoOfFour ? strip * per_strip * (kStrip * kUnit / 4) : 0;
    }
  }

  bool next() {
    if (!left) return false;
    --left;
    const int64_t index = count++;
    column = index * kUnit;
    switch (matrix.layout) {
      case kBitmask: expand(); break;
      case kTwoOfFour:
        column *= 2;
        copy();
        for (int k = 0; k < kStrip * kUnit; ++k) places[k] = (place[k / 4] >> (2 * (k % 4))) & 3;
        place += kStrip * kUnit / 4;
        break;
      case kTiles:
        column = static_cast<int64_t>(tile[index / (kTile / kUnit)]) * kTile + index % (kTile / kUnit) * kUnit;
        copy();
        break;
      default: copy();
    }
    return true;
  }

 private:
  const Matrix& matrix;
  const Value* weight;
  const uint8_t* place = nullptr;
  const int32_t* tile = nullptr;
  int64_t left, count = 0;

  void copy() {
    __builtin_memcpy(values, weight, sizeof values);
    weight += kStrip * kUnit;
  }

  void expand() {
    for (int byte = 0; byte < kStrip * kUnit / 8; ++byte) {
      const unsigned bits = *place++;
      for (int k = 0; k < 8; ++k) {
        const bool there = bits >> k & 1;
        values[8 * byte + k] = there ? *weight : Value(0);
        weight += there;
      }
    }
  }
};

}  // namespace
}  // namespace prunus
