// What the native side is told of a packed matrix; docs/sparse-format.md says what the pointers point at.
// Everything here was checked in Python (`check_packed`): the kernels read no more than that looked at.
#pragma once
#include <cstdint>

#include "attention.h"
#include "rows.h"

namespace prunus {

constexpr int kStrip = 16;      // rows that are multiplied together
constexpr int kCellBytes = 64;  // 16 rows x 2 columns of bfloat16, 16 x 4 of int8
constexpr int kGroup = 64;      // inputs that share one scale when they are rounded to int8
constexpr int kTile = 16;       // columns of a tile
constexpr int kMaxBatch = 16;   // inputs that a strip is multiplied with at once

enum Layout : int32_t { kDense = 0, kBitmask = 1, kTwoOfFour = 2, kTiles = 3 };

struct Matrix {
  int32_t layout, type;
  int64_t rows, columns;
  const void* weight;    // the values
  const void* index;     // mask, place or tile of the layout, or null
  const int64_t* start;  // where strips start in `weight` (bitmask: values, tiles: tiles), or null
  const float* scale;    // of each row, for int8
};

// The inputs of a product as kernels want them: `batch` rows, `stride` elements apart, zero past the last column.
struct Inputs {
  const uint16_t* bfloat16;  // for bfloat16 weights, where the caller's inputs are that
  const float* float32;      // for bfloat16 weights otherwise
  const int8_t* rounded;     // for int8 weights: round(x / scale)
  const float* scale;        // of each kGroup inputs, `stride / kGroup` to a row
  const uint32_t* offset;    // 128 times the sum of all rounded inputs before each kTile, `stride / kTile` to a row
  int64_t stride;
};

// One strip times up to kMaxBatch inputs, from the first of `inputs`: out[b][r], not yet times the scale of the row.
using StripProduct = void (*)(const Matrix&, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]);

// A strip of a matrix, and where that matrix' outputs go.
struct Strip {
  const Matrix& matrix;
  int64_t index;
  void* out;
};

// Two strips of one layout and type, not tiles, times one input.
using TwoStripsProduct = void (*)(const Strip& first, const Strip& second, const Inputs& inputs, float (*out)[kStrip]);

// `static`: each file has its own, compiled for its own processor.
static inline Inputs from(Inputs inputs, int64_t first) {
  if (inputs.bfloat16) inputs.bfloat16 += first * inputs.stride;
  if (inputs.float32) inputs.float32 += first * inputs.stride;
  if (inputs.rounded) inputs.rounded += first * inputs.stride;
  if (inputs.scale) inputs.scale += first * (inputs.stride / kGroup);
  if (inputs.offset) inputs.offset += first * (inputs.stride / kTile);
  return inputs;
}

// One strip with all its zeros: `rows` rows of bfloat16 or fp32, one after another from `out`.
using StripExpansion = void (*)(const Matrix&, int64_t strip, int rows, Type type, void* out);

struct Kernels {
  const char* name;
  bool has_bfloat16;  // whether Inputs::bfloat16 can be used
  StripProduct product;
  StripExpansion expand;
  HeadsAttention attend;
  TokenSteps rows;
  TwoStripsProduct two = nullptr;  // or null: one strip at a time is as good
};

extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels, avx512_kernels, avx512_full_kernels, amx_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels, neon_dot_kernels;
#endif

static inline int64_t strips_of(const Matrix& m) { return (m.rows + kStrip - 1) / kStrip; }
static inline int unit_of(const Matrix& m) { return m.type == kBfloat16 ? 2 : 4; }
static inline int64_t cells_of(const Matrix& m) { return (m.columns + unit_of(m) - 1) / unit_of(m); }
static inline int64_t kept_cells_of(const Matrix& m) { return ((m.columns + 3) / 4 * 2 + unit_of(m) - 1) / unit_of(m); }

}  // namespace prunus
