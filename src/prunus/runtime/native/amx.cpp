// AMX (Intel from Sapphire Rapids on), for several bfloat16 inputs: sixteen cells are what a tile of weights is, to the
// byte, and sixteen inputs cost little more than four. Fewer inputs, fp32 inputs and int8 weights, whose sums have to
// leave the tiles after every sixteen cells, go by AVX-512, which was measured to be faster there.
#if defined(__x86_64__)
#define PRUNUS_TARGET \
  "avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16,amx-tile,amx-bf16"
#include "target.h"

#define PRUNUS_LANES 16
#include "attention.inl"
#include "rows.inl"
#include "cells512.inl"

namespace prunus {
namespace {

constexpr int kSums = 2;     // that take turns: a tile product takes longer than the next can wait
constexpr int kFewest = 4;   // inputs from which tiles are faster

// The intrinsics do not tell the compiler which memory they read (gcc 12): it left out what was written for them alone.
#define PRUNUS_MEMORY(address) __asm__ volatile("" : : "r"(address) : "memory")
#define PRUNUS_LOAD(tile, from, stride) \
  do {                                  \
    PRUNUS_MEMORY(from);                \
    _tile_loadd(tile, from, stride);    \
    PRUNUS_MEMORY(from);                \
  } while (0)

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 and 1: sums, inputs x 16 rows. 2 and 3: inputs, as many columns as a step has. 4 and 5: weights, a cell a row.
void configure(int batch, int cells) {
  TileConfig config;
  for (int tile = 0; tile < 6; ++tile) {
    config.rows[tile] = tile < 4 ? batch : cells;
    config.bytes[tile] = tile == 2 || tile == 3 ? cells * 4 : kCellBytes;
  }
  PRUNUS_MEMORY(&config);
  _tile_loadconfig(&config);
}

// Two steps at a time: the second is unpacked before the first, then already written, is loaded as a tile.
template <class Source>
void product_in(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  configure(batch, Source::kWhole ? kTile / 2 : kStepCells);
  const int64_t stride = inputs.stride * 2;
  Steps<Source, 2> steps(m, strip);
  Step first, second;
  _tile_zero(0);
  _tile_zero(1);
  while (steps.next(first)) {
    const bool both = steps.next(second);
    PRUNUS_LOAD(2, inputs.bfloat16 + first.column, stride);
    PRUNUS_LOAD(4, first.weights, kCellBytes);
    _tile_dpbf16ps(0, 2, 4);
    if (!both) break;
    PRUNUS_LOAD(3, inputs.bfloat16 + second.column, stride);
    PRUNUS_LOAD(5, second.weights, kCellBytes);
    _tile_dpbf16ps(1, 3, 5);
  }
  alignas(64) float sums[kSums][kMaxBatch][kStrip];
  _tile_stored(0, sums[0], kCellBytes);
  _tile_stored(1, sums[1], kCellBytes);
  _tile_release();
  for (int b = 0; b < batch; ++b)
    for (int r = 0; r < kStrip; ++r) out[b][r] = sums[0][b][r] + sums[1][b][r];
}

void product(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  if (batch < kFewest || m.type != kBfloat16 || !inputs.bfloat16)
    return avx512_full_kernels.product(m, strip, inputs, batch, out);
  switch (m.layout) {
    case kDense: return product_in<Dense<false>>(m, strip, inputs, batch, out);
    case kBitmask: return product_in<Bitmask<uint16_t, uint32_t>>(m, strip, inputs, batch, out);
    case kTwoOfFour: return product_in<TwoOfFour<2>>(m, strip, inputs, batch, out);
    default: return product_in<Tiles>(m, strip, inputs, batch, out);
  }
}

// A call, lest the table be filled in before anyone asked whether this processor has what it takes.
void expand(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  avx512_full_kernels.expand(m, strip, rows, type, out);
}

void two(const Strip& first, const Strip& second, const Inputs& inputs, float (*out)[kStrip]) {
  avx512_full_kernels.two(first, second, inputs, out);
}

}  // namespace

const Kernels amx_kernels = {"amx", true, product, expand, attend, rows, two};

}  // namespace prunus
#include "target_end.h"
#endif
