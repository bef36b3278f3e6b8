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

// Several sums for one input hide the latency of a product behind the next ones.
template <class Product, class Source, int kBatch>
void floats(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  constexpr int kChains = kBatch == 1 ? 8 : kBatch == 2 ? 4 : kBatch == 4 ? 2 : 1;
  constexpr int kStep = 2 * Source::kColumns;
  __m512 sum[kChains][kBatch];
#pragma GCC unroll 8
  for (int chain = 0; chain < kChains; ++chain)
#pragma GCC unroll 8
    for (int b = 0; b < kBatch; ++b) sum[chain][b] = _mm512_setzero_ps();
  Source source(m, strip, INT64_MAX);
  Run run;
  while (source.next_run(run)) {
    const typename Product::Input* x = Product::first(inputs) + run.column;
    int cell = 0;
    for (; cell + kChains <= run.cells; cell += kChains) {
      source.template ask<kChains>();
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain, x += kStep) {
        const __m512i weights = source.next();
#pragma GCC unroll 8
        for (int b = 0; b < kBatch; ++b)
          sum[chain][b] = Product::add(sum[chain][b], weights, source, x + b * inputs.stride);
      }
    }
    for (; cell < run.cells; ++cell, x += kStep) {
      const __m512i weights = source.next();
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) sum[0][b] = Product::add(sum[0][b], weights, source, x + b * inputs.stride);
    }
  }
#pragma GCC unroll 8
  for (int b = 0; b < kBatch; ++b) {
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; ++chain) sum[0][b] = _mm512_add_ps(sum[0][b], sum[chain][b]);
    _mm512_storeu_ps(out[b], sum[0][b]);
  }
}

// Of the inputs of a run: those of one tile, or of a group, which is zero past its end.
template <class Source>
inline int32_t offset_of(const Inputs& inputs, int b, const Run& run) {
  const int32_t* from = inputs.offset + (b * inputs.stride + run.column) / kTile;
  return Source::kWhole ? from[0] : from[0] + from[1] + from[2] + from[3];
}

// int8 weights. The processor multiplies unsigned by signed bytes: weights are made unsigned, 128 more than they are, and
// `Inputs::offset` is taken off again. In 2:4, where each row has inputs of its own, inputs are made unsigned instead, and
// 128 times the sum of the weights is taken off.
template <class Source, int kBatch>
void bytes(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  constexpr int kAtOnce = kBatch == 1 ? 4 : 1, kChains = kBatch == 1 ? 2 : 1;
  constexpr int kStep = 4 * Source::kColumns;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(128));
  __m512 sum[kBatch];
  for (auto& one : sum) one = _mm512_setzero_ps();
  Source source(m, strip, kGroup / 4);
  Run run;
  while (source.next_run(run)) {
    __m512i products[kChains][kBatch], surplus[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      surplus[chain] = _mm512_setzero_si512();
      for (auto& one : products[chain]) one = _mm512_setzero_si512();
    }
    const int8_t* x = inputs.rounded + run.column;
    auto add = [&](int chain) __attribute__((always_inline)) {
      const __m512i weights = source.next(), above = _mm512_xor_si512(weights, offset);
      if constexpr (Source::kPlaced) surplus[chain] = _mm512_dpbusd_epi32(surplus[chain], offset, weights);
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) {
        __m512i& sums = products[chain][b];
        const int8_t* from = x + b * inputs.stride;
        if constexpr (Source::kPlaced) {
          const __m512i eight = _mm512_xor_si512(_mm512_set1_epi64(read<int64_t>(from)), offset);
          sums = _mm512_dpbusd_epi32(sums, _mm512_permutexvar_epi8(source.places, eight), weights);
        } else {
          sums = _mm512_dpbusd_epi32(sums, above, _mm512_set1_epi32(read<int32_t>(from)));
        }
      }
      x += kStep;
    };
    int cell = 0;
    for (; cell + kAtOnce <= run.cells; cell += kAtOnce) {
      source.template ask<kAtOnce>();
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; ++i) add(i % kChains);
    }
    for (; cell < run.cells; ++cell) add(0);
    for (int b = 0; b < kBatch; ++b) {
      if constexpr (Source::kPlaced)
        products[0][b] = _mm512_sub_epi32(products[0][b], surplus[0]);
      else
        products[0][b] = _mm512_sub_epi32(products[0][b], _mm512_set1_epi32(offset_of<Source>(inputs, b, run)));
      for (int chain = 1; chain < kChains; ++chain) {
        products[0][b] = _mm512_add_epi32(products[0][b], products[chain][b]);
        if constexpr (Source::kPlaced) products[0][b] = _mm512_sub_epi32(products[0][b], surplus[chain]);
      }
      const float scale = inputs.scale[(b * inputs.stride + run.column) / kGroup];
      sum[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[0][b]), _mm512_set1_ps(scale), sum[b]);
    }
  }
  for (int b = 0; b < kBatch; ++b) _mm512_storeu_ps(out[b], sum[b]);
}

template <class Source16, class Source8, int kBatch>
void product_in(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  if (m.type == kInt8)
    bytes<Source8, kBatch>(m, strip, inputs, out);
  else if (inputs.bfloat16)
    floats<PairProduct, Source16, kBatch>(m, strip, inputs, out);
  else
    floats<FloatProduct, Source16, kBatch>(m, strip, inputs, out);
}

template <int kBatch>
void product_of(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  switch (m.layout) {
    case kDense: return product_in<Dense<false>, Dense<true>, kBatch>(m, strip, inputs, out);
    case kBitmask:
      return product_in<Bitmask<uint16_t, uint32_t>, Bitmask<uint8_t, uint64_t>, kBatch>(m, strip, inputs, out);
    case kTwoOfFour: return product_in<TwoOfFour<2>, TwoOfFour<1>, kBatch>(m, strip, inputs, out);
    default: return product_in<Tiles, Tiles, kBatch>(m, strip, inputs, out);
  }
}

// Eight inputs at once, then four, two, one: the strip is in the nearest cache from the second time on.
void product(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  int done = 0;
  for (; batch - done >= 8; done += 8) product_of<8>(m, strip, from(inputs, done), out + done);
  if (batch & 4) product_of<4>(m, strip, from(inputs, done), out + done), done += 4;
  if (batch & 2) product_of<2>(m, strip, from(inputs, done), out + done), done += 2;
  if (batch & 1) product_of<1>(m, strip, from(inputs, done), out + done);
}

// Sixteen registers of sixteen words, rows for columns.
inline void transpose(__m512i (&x)[kStrip]) {
  __m512i t[kStrip];
  for (int i = 0; i < kStrip; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kStrip; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// The first `columns` values of a row that one register holds, to `out` on.
inline void put_bfloat16(__m512i row, int64_t columns, Type type, void* out) {
  const __mmask32 wanted = columns >= 32 ? ~0u : (1u << columns) - 1;
  if (type == kBfloat16) return _mm512_mask_storeu_epi16(out, wanted, row);
  float* to = static_cast<float*>(out);
  const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16);
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16);
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(wanted), _mm512_castsi512_ps(low));
  _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(wanted >> 16), _mm512_castsi512_ps(high));
}

inline void put_int8(__m512i row, int64_t columns, float scale, Type type, void* out) {
  const __m128i quarters[4] = {_mm512_castsi512_si128(row), _mm512_extracti32x4_epi32(row, 1),
                               _mm512_extracti32x4_epi32(row, 2), _mm512_extracti32x4_epi32(row, 3)};
  for (int q = 0; q < 4 && 16 * q < columns; ++q) {
    const int64_t here = columns - 16 * q;
    const __mmask16 wanted = here >= 16 ? 0xffff : (1u << here) - 1;
    const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarters[q])), _mm512_set1_ps(scale));
    if (type == kFloat32)
      _mm512_mask_storeu_ps(static_cast<float*>(out) + 16 * q, wanted, values);
    else
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + 16 * q, wanted,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
  }
}

template <class Source, int kValueBytes>
void expand_in(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  using AllSteps = Steps<Source, kValueBytes>;
  const int64_t size = type == kFloat32 ? 4 : 2;
  if (Source::kWhole) __builtin_memset(out, 0, rows * m.columns * size);
  AllSteps steps(m, strip);
  Step step;
  while (steps.next(step)) {
    const __m512i* cells = static_cast<const __m512i*>(step.weights);
    __m512i x[kStrip];
    for (int i = 0; i < kStrip; ++i) x[i] = i < AllSteps::kCells ? _mm512_loadu_si512(cells + i) : _mm512_setzero_si512();
    transpose(x);
    const int64_t width = AllSteps::kCells * AllSteps::kUnit, left = m.columns - step.column;
    const int64_t columns = left < width ? left : width;
    for (int r = 0; r < rows; ++r) {
      void* to = static_cast<char*>(out) + (r * m.columns + step.column) * size;
      if constexpr (kValueBytes == 2)
        put_bfloat16(x[r], columns, type, to);
      else
        put_int8(x[r], columns, m.scale[strip * kStrip + r], type, to);
    }
  }
}

void expand(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  const bool small = m.type == kInt8;
  switch (m.layout) {
    case kDense: return (small ? expand_in<Dense<false>, 1> : expand_in<Dense<false>, 2>)(m, strip, rows, type, out);
    case kBitmask:
      return (small ? expand_in<Bitmask<uint8_t, uint64_t>, 1>
                    : expand_in<Bitmask<uint16_t, uint32_t>, 2>)(m, strip, rows, type, out);
    case kTwoOfFour: return (small ? expand_in<TwoOfFour<1>, 1> : expand_in<TwoOfFour<2>, 2>)(m, strip, rows, type, out);
    default: return (small ? expand_in<Tiles, 1> : expand_in<Tiles, 2>)(m, strip, rows, type, out);
  }
}

}  // namespace

const Kernels avx512_full_kernels = {"avx512-vbmi2", true, product, expand, attend, rows};

}  // namespace prunus
#include "target_end.h"
#endif
