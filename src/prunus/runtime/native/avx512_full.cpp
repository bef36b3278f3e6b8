// AVX-512 with VBMI, VBMI2, VNNI and BF16 (Intel from Ice Lake / Sapphire Rapids on, AMD from Zen 4).
// A cell is one register: expanded by its mask, multiplied by two or four inputs, sixteen rows at once.
#if defined(__x86_64__)
#define PRUNUS_TARGET "avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16"
#include "target.h"

#include <immintrin.h>

#define PRUNUS_LANES 16
#include "attention.inl"
#include "rows.inl"
#include "cells512.inl"
#include "expand512.inl"

namespace prunus {
namespace {

// bfloat16 weights, bfloat16 inputs: pairs of products, summed in fp32.
struct PairProduct {
  using Input = uint16_t;
  static const Input* first(const Inputs& inputs) { return inputs.bfloat16; }
  template <class Source>
  static __m512 add(__m512 sum, __m512i weights, const Source& source, const Input* x) {
    __m512i pair;
    if constexpr (Source::kPlaced)
      pair = _mm512_permutexvar_epi16(source.places, _mm512_set1_epi64(read<int64_t>(x)));
    else
      pair = _mm512_set1_epi32(read<int32_t>(x));
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(pair));
  }
};

// bfloat16 weights, fp32 inputs: the weights of a pair are the two halves of a word.
struct FloatProduct {
  using Input = float;
  static const Input* first(const Inputs& inputs) { return inputs.float32; }
  template <class Source>
  static __m512 add(__m512 sum, __m512i weights, const Source& source, const Input* x) {
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16));
    const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(weights, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    __m512 x_even, x_odd;
    if constexpr (Source::kPlaced) {
      const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
      x_even = _mm512_permutexvar_ps(_mm512_and_si512(source.places, _mm512_set1_epi32(0xffff)), four);
      x_odd = _mm512_permutexvar_ps(_mm512_srli_epi32(source.places, 16), four);
    } else {
      x_even = _mm512_set1_ps(x[0]);
      x_odd = _mm512_set1_ps(x[1]);
    }
    return _mm512_fmadd_ps(odd, x_odd, _mm512_fmadd_ps(even, x_even, sum));
  }
};

// Strips of the same runs; out: a row for each strip and input. Several sums for one input hide the latency of a product
// behind the next ones: as many for one strip as for each of two, so that results do not depend on which it was.
template <class Product, int kBatch, class Source, int kStrips>
void floats(Source (&sources)[kStrips], const Inputs& inputs, float (*out)[kStrip]) {
  constexpr int kChains = kBatch == 1 ? 4 : kBatch < 8 ? 8 / kBatch : 1, kStep = 2 * Source::kColumns;
  __m512 sum[kChains][kStrips][kBatch];
#pragma GCC unroll 8
  for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 2
    for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) sum[chain][s][b] = _mm512_setzero_ps();
  Run run;
  while (next_run(sources, run)) {
    const typename Product::Input* x = Product::first(inputs) + run.column;
    auto add = [&](int chain) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int s = 0; s < kStrips; ++s) {
        const __m512i weights = sources[s].next();
#pragma GCC unroll 8
        for (int b = 0; b < kBatch; ++b)
          sum[chain][s][b] = Product::add(sum[chain][s][b], weights, sources[s], x + b * inputs.stride);
      }
      x += kStep;
    };
    int cell = 0;
    for (; cell + kChains <= run.cells; cell += kChains) {
      for (auto& source : sources) source.template ask<kChains>();
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain) add(chain);
    }
    for (; cell < run.cells; ++cell) add(0);
  }
#pragma GCC unroll 2
  for (int s = 0; s < kStrips; ++s)
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) {
#pragma GCC unroll 8
      for (int chain = 1; chain < kChains; ++chain) sum[0][s][b] = _mm512_add_ps(sum[0][s][b], sum[chain][s][b]);
      _mm512_storeu_ps(out[s * kBatch + b], sum[0][s][b]);
    }
}

// Which sums the products of a run start from, where weights are unsigned: of the inputs of one tile, or of a group.
template <class Source>
inline __m512i less_offset(const Inputs& inputs, int64_t column) {
  const uint32_t* from = inputs.offset + static_cast<uint64_t>(column) / kTile;
  return _mm512_set1_epi32(static_cast<int32_t>(from[0] - from[Source::kWhole ? 1 : kGroup / kTile]));
}

// int8 weights. The processor multiplies unsigned by signed bytes: weights are made unsigned, 128 more than they are, and
// `Inputs::offset` is taken off before. In 2:4, where each row has inputs of its own, inputs are made unsigned instead, and
// 128 times the sum of the weights is taken off.
template <int kBatch, class Source, int kStrips>
void bytes(Source (&sources)[kStrips], const Inputs& inputs, float (*out)[kStrip]) {
  constexpr int kAtOnce = kBatch == 1 ? 4 : 1, kChains = kBatch * kStrips == 1 ? 2 : 1;
  constexpr int kStep = 4 * Source::kColumns;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(128));
  __m512 sum[kStrips][kBatch];
  for (auto& strip : sum)
    for (auto& one : strip) one = _mm512_setzero_ps();
  Run run;
  while (next_run(sources, run)) {
    __m512i products[kChains][kStrips][kBatch], surplus[kChains][kStrips];
    for (int chain = 0; chain < kChains; ++chain)
      for (int s = 0; s < kStrips; ++s) {
        surplus[chain][s] = _mm512_setzero_si512();
        for (int b = 0; b < kBatch; ++b)
          products[chain][s][b] = Source::kPlaced || chain
                                      ? _mm512_setzero_si512()
                                      : less_offset<Source>(inputs, b * inputs.stride + run.column);
      }
    const int8_t* x = inputs.rounded + run.column;
    auto add = [&](int chain, int s) __attribute__((always_inline)) {
      const __m512i weights = sources[s].next(), above = _mm512_xor_si512(weights, offset);
      if constexpr (Source::kPlaced) surplus[chain][s] = _mm512_dpbusd_epi32(surplus[chain][s], offset, weights);
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) {
        __m512i& sums = products[chain][s][b];
        const int8_t* from = x + b * inputs.stride;
        if constexpr (Source::kPlaced) {
          const __m512i eight = _mm512_xor_si512(_mm512_set1_epi64(read<int64_t>(from)), offset);
          sums = _mm512_dpbusd_epi32(sums, _mm512_permutexvar_epi8(sources[s].places, eight), weights);
        } else {
          sums = _mm512_dpbusd_epi32(sums, above, _mm512_set1_epi32(read<int32_t>(from)));
        }
      }
    };
    int cell = 0;
    for (; cell + kAtOnce <= run.cells; cell += kAtOnce) {
      for (auto& source : sources) source.template ask<kAtOnce>();
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i, x += kStep)
#pragma GCC unroll 2
        for (int s = 0; s < kStrips; ++s) add(i % kChains, s);
    }
    for (; cell < run.cells; ++cell, x += kStep)
      for (int s = 0; s < kStrips; ++s) add(0, s);
    for (int s = 0; s < kStrips; ++s)
      for (int b = 0; b < kBatch; ++b) {
        __m512i all = products[0][s][b];
        if constexpr (Source::kPlaced) all = _mm512_sub_epi32(all, surplus[0][s]);
        for (int chain = 1; chain < kChains; ++chain) {
          all = _mm512_add_epi32(all, products[chain][s][b]);
          if constexpr (Source::kPlaced) all = _mm512_sub_epi32(all, surplus[chain][s]);
        }
        const float scale = inputs.scale[static_cast<uint64_t>(b * inputs.stride + run.column) / kGroup];
        sum[s][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_set1_ps(scale), sum[s][b]);
      }
  }
  for (int s = 0; s < kStrips; ++s)
    for (int b = 0; b < kBatch; ++b) _mm512_storeu_ps(out[s * kBatch + b], sum[s][b]);
}

// Strips of one layout and type.
template <class Source16, class Source8, int kBatch, class... Strips>
void product_in(const Inputs& inputs, float (*out)[kStrip], const Strip& first, const Strips&... others) {
  constexpr int kCount = 1 + sizeof...(others);
  if (first.matrix.type == kInt8) {
    constexpr int64_t kCells = kGroup / 4;
    Source8 sources[kCount] = {{first.matrix, first.index, kCells}, {others.matrix, others.index, kCells}...};
    return bytes<kBatch>(sources, inputs, out);
  }
  Source16 sources[kCount] = {{first.matrix, first.index, INT64_MAX}, {others.matrix, others.index, INT64_MAX}...};
  if (inputs.bfloat16)
    floats<PairProduct, kBatch>(sources, inputs, out);
  else
    floats<FloatProduct, kBatch>(sources, inputs, out);
}

template <int kBatch, class... Strips>
void product_of(const Inputs& inputs, float (*out)[kStrip], const Strip& first, const Strips&... others) {
  switch (first.matrix.layout) {
    case kDense: return product_in<Dense<false>, Dense<true>, kBatch>(inputs, out, first, others...);
    case kBitmask:
      return product_in<Bitmask<uint16_t, uint32_t>, Bitmask<uint8_t, uint64_t>, kBatch>(inputs, out, first, others...);
    case kTwoOfFour: return product_in<TwoOfFour<2>, TwoOfFour<1>, kBatch>(inputs, out, first, others...);
    default:
      if constexpr (sizeof...(others) == 0) return product_in<Tiles, Tiles, kBatch>(inputs, out, first);
  }
}

// Eight inputs at once, then four, two, one: the strip is in the nearest cache from the second time on.
void product(const Matrix& m, int64_t index, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  const Strip strip = {m, index, nullptr};
  int done = 0;
  for (; batch - done >= 8; done += 8) product_of<8>(from(inputs, done), out + done, strip);
  if (batch & 4) product_of<4>(from(inputs, done), out + done, strip), done += 4;
  if (batch & 2) product_of<2>(from(inputs, done), out + done, strip), done += 2;
  if (batch & 1) product_of<1>(from(inputs, done), out + done, strip);
}

void two(const Strip& first, const Strip& second, const Inputs& inputs, float (*out)[kStrip]) {
  product_of<1>(inputs, out, first, second);
}

}  // namespace

const Kernels avx512_full_kernels = {"avx512-vbmi2", true, product, expand, attend, rows, two};

}  // namespace prunus
#include "target_end.h"
#endif
