// AVX-512 with VBMI, VBMI2, VNNI and BF16 (Intel from Ice Lake / Sapphire Rapids on, AMD from Zen 4).
// A cell is one register: expanded by its mask, multiplied by two or four inputs, sixteen rows at once.
#if defined(__x86_64__)
#define PRUNUS_TARGET "avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx512bf16"
#include "target.h"

#include <immintrin.h>

#include "matrix.h"

namespace prunus {
namespace {

using Word = int32_t;

// Cells come in runs of neighbouring columns: one run a strip for bfloat16, one for each scale of the inputs for int8.
struct Run {
  int64_t column;
  int cells;
};

// Where the cells of a strip come from. `next` gives the weights; `places` which inputs they are for, in 2:4 alone.
struct Dense {
  static constexpr bool kPlaced = false;
  static constexpr int kColumns = 1;  // columns of the matrix that a cell covers, in units
  const uint8_t* values;
  int64_t left, per_run, column = 0;
  Dense(const Matrix& m, int64_t strip, int64_t per_run)
      : values(static_cast<const uint8_t*>(m.weight) + strip * cells_of(m) * kCellBytes),
        left(cells_of(m)),
        per_run(per_run) {}
  bool next_run(Run& run, int unit) {
    if (!left) return false;
    run = {column, static_cast<int>(left < per_run ? left : per_run)};
    left -= run.cells;
    column += static_cast<int64_t>(run.cells) * unit;
    return true;
  }
  __m512i next() {
    const __m512i weights = _mm512_loadu_si512(values);
    values += kCellBytes;
    return weights;
  }
};

template <class Value, class Mask>
struct Bitmask {
  static constexpr bool kPlaced = false;
  static constexpr int kColumns = 1;
  const Value* values;
  const Mask* mask;
  int64_t left, per_run, column = 0;
  Bitmask(const Matrix& m, int64_t strip, int64_t per_run)
      : values(static_cast<const Value*>(m.weight) + m.start[strip]),
        mask(static_cast<const Mask*>(m.index) + strip * cells_of(m)),
        left(cells_of(m)),
        per_run(per_run) {}
  bool next_run(Run& run, int unit) {
    if (!left) return false;
    run = {column, static_cast<int>(left < per_run ? left : per_run)};
    left -= run.cells;
    column += static_cast<int64_t>(run.cells) * unit;
    return true;
  }
  // The form that reads memory: it reads the values that are there and none behind them.
  __m512i next() {
    const Mask bits = *mask++;
    const Value* from = values;
    values += __builtin_popcountll(bits);
    if constexpr (sizeof(Value) == 2)
      return _mm512_maskz_expandloadu_epi16(bits, from);
    else
      return _mm512_maskz_expandloadu_epi8(bits, from);
  }
};

// 2:4. Places are two bits for each value: spread to one byte (int8) or two (bfloat16), and inside the register's four
// or eight columns.
template <int kValueBytes>
struct TwoOfFour {
  static constexpr bool kPlaced = true;
  static constexpr int kColumns = 2;
  const uint8_t *values, *place;
  int64_t left, per_run, column = 0;
  __m512i places;
  TwoOfFour(const Matrix& m, int64_t strip, int64_t per_run)
      : values(static_cast<const uint8_t*>(m.weight) + strip * kept_cells_of(m) * kCellBytes),
        place(static_cast<const uint8_t*>(m.index) + strip * kept_cells_of(m) * (kValueBytes == 2 ? 8 : 16)),
        left(kept_cells_of(m)),
        per_run(per_run / 2 ? per_run / 2 : 1) {}
  bool next_run(Run& run, int unit) {
    if (!left) return false;
    run = {column, static_cast<int>(left < per_run ? left : per_run)};
    left -= run.cells;
    column += static_cast<int64_t>(run.cells) * unit * kColumns;
    return true;
  }
  __m512i next() {
    const __m512i weights = _mm512_loadu_si512(values);
    values += kCellBytes;
    if constexpr (kValueBytes == 2) {
      const __m512i packed = _mm512_set1_epi64(*reinterpret_cast<const int64_t*>(place));
      // the eight places of register quarter q are its 8 bits: word k needs bits 2k, 2k + 1
      const __m512i shifts = _mm512_set_epi64(
          0x003e003c003a0038, 0x0036003400320030, 0x002e002c002a0028, 0x0026002400220020, 0x001e001c001a0018,
          0x0016001400120010, 0x000e000c000a0008, 0x0006000400020000);
      places = _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, packed), _mm512_set1_epi16(3));
      place += 8;
    } else {
      const __m512i packed = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(place)));
      const __m512i shifts = _mm512_set1_epi64(0x0e0c0a0806040200);
      const __m512i half = _mm512_set1_epi32(0x04040000);  // the third and fourth value of a row: the second four
      places = _mm512_or_si512(
          _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, packed), _mm512_set1_epi8(3)), half);
      place += 16;
    }
    return weights;
  }
};

struct Tiles {
  static constexpr bool kPlaced = false;
  static constexpr int kColumns = 1;
  const uint8_t* values;
  const int32_t *tile, *end;
  int cells;
  Tiles(const Matrix& m, int64_t strip, int64_t)
      : tile(static_cast<const int32_t*>(m.index) + m.start[strip]),
        end(static_cast<const int32_t*>(m.index) + m.start[strip + 1]),
        cells(kTile / unit_of(m)) {
    values = static_cast<const uint8_t*>(m.weight) + m.start[strip] * cells * kCellBytes;
  }
  bool next_run(Run& run, int) {
    if (tile == end) return false;
    run = {static_cast<int64_t>(*tile++) * kTile, cells};
    return true;
  }
  __m512i next() {
    const __m512i weights = _mm512_loadu_si512(values);
    values += kCellBytes;
    return weights;
  }
};

template <class To>
inline To read(const void* from) {
  To value;
  __builtin_memcpy(&value, from, sizeof(To));
  return value;
}

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
      pair = _mm512_set1_epi32(read<Word>(x));
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
  for (auto& chain : sum)
    for (auto& one : chain) one = _mm512_setzero_ps();
  Source source(m, strip, INT64_MAX);
  Run run;
  while (source.next_run(run, 2)) {
    const typename Product::Input* x = Product::first(inputs) + run.column;
    int cell = 0;
    for (; cell + kChains <= run.cells; cell += kChains)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain, x += kStep) {
        const __m512i weights = source.next();
#pragma GCC unroll 8
        for (int b = 0; b < kBatch; ++b)
          sum[chain][b] = Product::add(sum[chain][b], weights, source, x + b * inputs.stride);
      }
    for (; cell < run.cells; ++cell, x += kStep) {
      const __m512i weights = source.next();
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) sum[0][b] = Product::add(sum[0][b], weights, source, x + b * inputs.stride);
    }
  }
  for (int b = 0; b < kBatch; ++b) {
    for (int chain = 1; chain < kChains; ++chain) sum[0][b] = _mm512_add_ps(sum[0][b], sum[chain][b]);
    _mm512_storeu_ps(out[b], sum[0][b]);
  }
}

// int8 weights: inputs are unsigned, 128 more than they are, so 128 times the sum of the weights is taken off again.
template <class Source, int kBatch>
void bytes(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  constexpr int kChains = kBatch == 1 ? 2 : 1;
  constexpr int kStep = 4 * Source::kColumns;
  const __m512i offset = _mm512_set1_epi8(static_cast<char>(128));
  __m512 sum[kBatch];
  for (auto& one : sum) one = _mm512_setzero_ps();
  Source source(m, strip, kGroup / 4);
  Run run;
  while (source.next_run(run, 4)) {
    __m512i products[kChains][kBatch], surplus[kChains];
    for (int chain = 0; chain < kChains; ++chain) {
      surplus[chain] = _mm512_setzero_si512();
      for (auto& one : products[chain]) one = _mm512_setzero_si512();
    }
    const uint8_t* x = inputs.rounded + run.column;
    const float* scale = inputs.scale + run.column / kGroup;
#pragma GCC unroll 2
    for (int cell = 0; cell < run.cells; ++cell, x += kStep) {
      const int chain = kChains == 1 ? 0 : cell & 1;
      const __m512i weights = source.next();
      surplus[chain] = _mm512_dpbusd_epi32(surplus[chain], offset, weights);
#pragma GCC unroll 8
      for (int b = 0; b < kBatch; ++b) {
        const uint8_t* from = x + b * inputs.stride;
        __m512i four;
        if constexpr (Source::kPlaced)
          four = _mm512_permutexvar_epi8(source.places, _mm512_set1_epi64(read<int64_t>(from)));
        else
          four = _mm512_set1_epi32(read<Word>(from));
        products[chain][b] = _mm512_dpbusd_epi32(products[chain][b], four, weights);
      }
    }
    if constexpr (kChains == 2) {
      surplus[0] = _mm512_add_epi32(surplus[0], surplus[1]);
      for (int b = 0; b < kBatch; ++b) products[0][b] = _mm512_add_epi32(products[0][b], products[1][b]);
    }
    for (int b = 0; b < kBatch; ++b) {
      const __m512 whole = _mm512_cvtepi32_ps(_mm512_sub_epi32(products[0][b], surplus[0]));
      sum[b] = _mm512_fmadd_ps(whole, _mm512_set1_ps(scale[b * (inputs.stride / kGroup)]), sum[b]);
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
    case kDense: return product_in<Dense, Dense, kBatch>(m, strip, inputs, out);
    case kBitmask:
      return product_in<Bitmask<uint16_t, uint32_t>, Bitmask<uint8_t, uint64_t>, kBatch>(m, strip, inputs, out);
    case kTwoOfFour: return product_in<TwoOfFour<2>, TwoOfFour<1>, kBatch>(m, strip, inputs, out);
    default: return product_in<Tiles, Tiles, kBatch>(m, strip, inputs, out);
  }
}

Inputs from(const Inputs& inputs, int first) {
  Inputs rest = inputs;
  if (rest.bfloat16) rest.bfloat16 += first * inputs.stride;
  if (rest.float32) rest.float32 += first * inputs.stride;
  if (rest.rounded) rest.rounded += first * inputs.stride;
  if (rest.scale) rest.scale += first * (inputs.stride / kGroup);
  return rest;
}

// Eight inputs at once, then four, two, one: the strip is in the nearest cache from the second time on.
void product(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  int done = 0;
  if (batch & 8) product_of<8>(m, strip, from(inputs, done), out + done), done += 8;
  if (batch & 4) product_of<4>(m, strip, from(inputs, done), out + done), done += 4;
  if (batch & 2) product_of<2>(m, strip, from(inputs, done), out + done), done += 2;
  if (batch & 1) product_of<1>(m, strip, from(inputs, done), out + done);
}

}  // namespace

const Kernels avx512_full_kernels = {"avx512-vbmi2", true, product};

}  // namespace prunus
#include "target_end.h"
#endif
