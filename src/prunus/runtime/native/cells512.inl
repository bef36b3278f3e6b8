// Where the cells of a strip come from, in registers of 512 bits: included where AVX-512 with VBMI2 may be used.
#include <immintrin.h>

#include "matrix.h"
#include "numbers.h"

namespace prunus {
namespace {

// Cells come in runs of neighbouring columns: one run a strip for bfloat16, one for each scale of the inputs for int8.
struct Run {
  int64_t column;
  int cells;
};

struct Neighbours {
  int64_t left, per_run, columns, column = 0;  // `columns`: of the matrix, in a cell
  bool next_run(Run& run) {
    if (!left) return false;
    run = {column, static_cast<int>(left < per_run ? left : per_run)};
    left -= run.cells;
    column += run.cells * columns;
    return true;
  }
};

// Sources of strips of one layout and as many columns have the same runs, tiles apart.
template <class Source, int kStrips>
inline bool next_run(Source (&sources)[kStrips], Run& run) {
  bool more = false;
  for (auto& source : sources) more = source.next_run(run);
  return more;
}

// Memory is asked for before it is used: the hardware asks too late, above all when a cell takes few bytes. Past the end it
// does no harm. Not by the intrinsic: gcc 12 takes a loop of those for one that does nothing, and at times leaves it out.
template <int kBytes>
inline void ask_for(const void* memory) {
  __asm__ volatile("prefetcht0 %0" : : "m"(static_cast<const char*>(memory)[kBytes]));
}

// The same into the second cache.
template <int kBytes>
inline void ask_from_far(const void* memory) {
  __asm__ volatile("prefetcht1 %0" : : "m"(static_cast<const char*>(memory)[kBytes]));
}

// Of weights that are read cell by cell, into the second cache: the hardware brings them on from there. AMD's asks early
// enough by itself, and asking again costs (Zen 4, int8: dense 96% of the bandwidth against 86%, tiles at 80% 85 against 77).
struct WholeCells {
  const uint8_t* values;
  const bool asks;

  WholeCells(const void* all, int64_t first, bool may_ask = true)
      : values(static_cast<const uint8_t*>(all) + first * kCellBytes), asks(may_ask && !__builtin_cpu_is("amd")) {}
  __m512i take() {
    if (asks) ask_from_far<8192>(values);
    const __m512i weights = _mm512_loadu_si512(values);
    values += kCellBytes;
    return weights;
  }
};

// Where the cells of a strip come from, `per_run` of whole columns in a run. `ask` is called before every kCells,
// `next` gives the weights; `places` which inputs they are for, in 2:4 alone.
template <bool kAsk>  // for bfloat16 it was slower with asking
struct Dense : Neighbours, WholeCells {
  static constexpr bool kPlaced = false, kWhole = false, kInPlace = true;
  static constexpr int kColumns = 1;  // columns of the matrix that a cell covers, in units
  Dense(const Matrix& m, int64_t strip, int64_t per_run)
      : Neighbours{cells_of(m), per_run, unit_of(m)}, WholeCells(m.weight, strip * cells_of(m), kAsk) {}
  template <int>
  void ask() {}
  __m512i next() { return take(); }
};

template <class Value, class Mask>
struct Bitmask : Neighbours {
  static constexpr bool kPlaced = false, kWhole = false, kInPlace = false;
  static constexpr bool kFromFar = sizeof(Value) == 1;
  static constexpr int kColumns = 1;
  const Value* values;
  const Mask* mask;
  Bitmask(const Matrix& m, int64_t strip, int64_t per_run)
      : Neighbours{cells_of(m), per_run, unit_of(m)},
        values(static_cast<const Value*>(m.weight) + m.start[strip]),
        mask(static_cast<const Mask*>(m.index) + strip * cells_of(m)) {}
  // As many lines as the values of those cells take at 50%. int8 is asked for twice, from far, then near: a cell has fewer
  // bytes. The distances are measured ones (docs/log.md).
  template <int kCells>
  void ask() {
    ask_for<512>(mask);
    if constexpr (kFromFar) ask_from_far<2048>(mask);
    const char* line = reinterpret_cast<const char*>(values);
#pragma GCC unroll 8
    for (int i = 0; i < (kCells + 1) / 2; ++i, line += kCellBytes) {
      ask_for<kFromFar ? 1024 : 2048>(line);
      if constexpr (kFromFar) ask_from_far<4096>(line);
    }
  }
  // The form that reads memory: it reads the values that are there and none behind them. Zeros come from a register that
  // the compiler cannot see through: AMD's Zen 4 makes the form with zeros of its own wait for the register that it
  // writes (70% zeros in bfloat16, in the caches: 2.2 ns a cell against 1.2). Masks come by a general register, where the
  // compiler would read each twice: int8 at 80% takes 5% less.
  __m512i next() {
    Mask bits = *mask++;
    __asm__("" : "+r"(bits));
    const Value* from = values;
    values += __builtin_popcountll(bits);
    __m512i zeros = _mm512_setzero_si512();
    __asm__("" : "+v"(zeros));
    if constexpr (sizeof(Value) == 2)
      return _mm512_mask_expandloadu_epi16(zeros, bits, from);
    else
      return _mm512_mask_expandloadu_epi8(zeros, bits, from);
  }
};

// 2:4. Places are two bits for each value: spread to one byte (int8) or two (bfloat16), and inside the register's four
// or eight columns.
template <int kValueBytes>
struct TwoOfFour : Neighbours, WholeCells {
  static constexpr bool kPlaced = true, kWhole = false, kInPlace = false;
  static constexpr int kColumns = 2;
  const uint8_t* place;
  __m512i places;
  TwoOfFour(const Matrix& m, int64_t strip, int64_t per_run)
      : Neighbours{kept_cells_of(m), per_run / kColumns, kColumns * unit_of(m)},
        WholeCells(m.weight, strip * kept_cells_of(m)),
        place(static_cast<const uint8_t*>(m.index) + strip * kept_cells_of(m) * (kValueBytes == 2 ? 8 : 16)) {}
  template <int>
  void ask() {}
  __m512i next() {
    const __m512i weights = take();
    if constexpr (kValueBytes == 2) {
      const __m512i packed = _mm512_set1_epi64(read<int64_t>(place));
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

struct Tiles : WholeCells {
  static constexpr bool kPlaced = false, kWhole = true, kInPlace = true;
  static constexpr int kColumns = 1;
  const int32_t *tile, *end;
  int cells;
  Tiles(const Matrix& m, int64_t strip, int64_t)
      : WholeCells(m.weight, m.start[strip] * (kTile / unit_of(m))),
        tile(static_cast<const int32_t*>(m.index) + m.start[strip]),
        end(static_cast<const int32_t*>(m.index) + m.start[strip + 1]),
        cells(kTile / unit_of(m)) {}
  template <int>
  void ask() {}
  bool next_run(Run& run) {
    if (tile == end) return false;
    run = {static_cast<int64_t>(*tile++) * kTile, cells};
    return true;
  }
  __m512i next() { return take(); }
};

// A cell of 2:4 becomes two of all columns: each column takes the one of the two kept weights that belongs there.
template <int kValueBytes>
inline void widen(__m512i values, __m512i places, __m512i* out) {
  const __m512i row = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
  for (int half = 0; half < 2; ++half) {
    const int first = kValueBytes == 2 ? 0x01000100 : half * 0x02020202;
    const int second = kValueBytes == 2 ? 0x03020302 : first + 0x01010101;
    const __m512i a = _mm512_add_epi8(row, _mm512_set1_epi32(first)), b = _mm512_add_epi8(row, _mm512_set1_epi32(second));
    const __m512i value_a = _mm512_shuffle_epi8(values, a), value_b = _mm512_shuffle_epi8(values, b);
    const __m512i place_a = _mm512_shuffle_epi8(places, a), place_b = _mm512_shuffle_epi8(places, b);
    if constexpr (kValueBytes == 2) {
      const __m512i column = _mm512_set1_epi32(half ? 0x00030002 : 0x00010000);
      const __m512i cell = _mm512_maskz_mov_epi16(_mm512_cmpeq_epi16_mask(place_a, column), value_a);
      out[half] = _mm512_mask_mov_epi16(cell, _mm512_cmpeq_epi16_mask(place_b, column), value_b);
    } else {
      const __m512i column = _mm512_set1_epi32(half ? 0x07060504 : 0x03020100);
      const __m512i cell = _mm512_maskz_mov_epi8(_mm512_cmpeq_epi8_mask(place_a, column), value_a);
      out[half] = _mm512_mask_mov_epi8(cell, _mm512_cmpeq_epi8_mask(place_b, column), value_b);
    }
  }
}

// Sixteen cells, or those of a tile, with all their zeros: in a buffer or, where they lie like that, in place.
constexpr int kStepCells = 16;

struct Step {
  alignas(64) __m512i buffer[kStepCells];
  const void* weights;
  int64_t column;
};

// Steps of a tile or of sixteen cells, the last one filled up with zeros.
template <class Source, int kValueBytes>
struct Steps {
  Source source;
  static constexpr int kUnit = kCellBytes / kStrip / kValueBytes;
  static constexpr int kCells = Source::kWhole ? kTile / kUnit : kStepCells;  // of a step
  static constexpr int kPacked = kStepCells / Source::kColumns;               // cells of the source in it

  Steps(const Matrix& m, int64_t strip) : source(m, strip, kStepCells) {}

  bool next(Step& step) {
    Run run;
    if (!source.next_run(run)) return false;
    step.column = run.column;
    if constexpr (Source::kInPlace)
      if (run.cells == kCells) {
        step.weights = source.values;
        source.values += kCells * kCellBytes;
        return true;
      }
    step.weights = step.buffer;
    source.template ask<kPacked>();
    for (int cell = 0; cell < kPacked; ++cell) {
      const __m512i weights = cell < run.cells ? source.next() : _mm512_setzero_si512();
      if constexpr (Source::kPlaced)
        widen<kValueBytes>(weights, source.places, step.buffer + 2 * cell);
      else
        step.buffer[cell] = weights;
    }
    return true;
  }
};

}  // namespace
}  // namespace prunus
