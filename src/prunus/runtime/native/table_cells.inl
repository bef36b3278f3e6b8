// Where the cells of a strip come from on processors that cannot expand bytes by a mask: a table says for eight bits where
// each byte goes. A cell is kParts registers.
#include <cstdint>

#include "matrix.h"
#include "numbers.h"

namespace prunus {
namespace {

using Ints = Vector::Ints;
using Floats = Vector::Floats;

constexpr int kParts = kStrip / Vector::kRows;
constexpr int kPartBytes = kCellBytes / kParts;
constexpr int kQuarters = 4;  // of a cell: sixteen bytes, what one step of the table gives

// For eight bits of a mask, which value each of eight places takes (0x80: none). Bytes: in `low` the places, in `count`
// how many values there are, eight times, so that the places of the next eight bits can be moved by it.
struct alignas(16) Places8 {
  uint8_t low[8], count[8];
};
struct alignas(16) Places16 {
  uint8_t low[16];
};

struct Tables {
  Places8 bytes[256] = {};
  Places16 words[256] = {};

  constexpr Tables() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t values = 0;
      for (int k = 0; k < 8; ++k) {
        const bool there = bits >> k & 1;
        bytes[bits].low[k] = there ? values : 0x80;
        words[bits].low[2 * k] = there ? 2 * values : 0x80;
        words[bits].low[2 * k + 1] = there ? 2 * values + 1 : 0x80;
        values += there;
      }
      for (uint8_t& count : bytes[bits].count) count = values;
    }
  }
};

constexpr Tables tables;

struct Cell {
  Ints weights[kParts];
  Ints places[kParts];  // 2:4 alone: which of its inputs each weight is for
};

// Cells come in runs of neighbouring columns, a run for each scale of the inputs.
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

inline void load(const uint8_t*& values, Cell& cell) {
  for (int part = 0; part < kParts; ++part) cell.weights[part] = Vector::load(values + part * kPartBytes);
  values += kCellBytes;
}

template <class Value>
struct Dense : Neighbours {
  static constexpr bool kPlaced = false;
  static constexpr int kColumns = kCellBytes / kStrip / sizeof(Value);
  const uint8_t* values;
  Dense(const Matrix& m, int64_t strip)
      : Neighbours{cells_of(m), kGroup / kColumns, kColumns},
        values(static_cast<const uint8_t*>(m.weight) + strip * cells_of(m) * kCellBytes) {}
  void next(Cell& cell) { load(values, cell); }
};

template <class Value>
struct Bitmask : Neighbours {
  static constexpr bool kPlaced = false;
  static constexpr int kColumns = kCellBytes / kStrip / sizeof(Value);
  static constexpr int kMaskBytes = kCellBytes / sizeof(Value) / 8, kQuarterBits = 16 / sizeof(Value);
  const uint8_t *values, *end, *mask;
  Bitmask(const Matrix& m, int64_t strip)
      : Neighbours{cells_of(m), kGroup / kColumns, kColumns},
        values(static_cast<const uint8_t*>(m.weight) + m.start[strip] * sizeof(Value)),
        end(static_cast<const uint8_t*>(m.weight) + m.start[strips_of(m)] * sizeof(Value)),
        mask(static_cast<const uint8_t*>(m.index) + strip * cells_of(m) * kMaskBytes) {}

  // Sixteen bytes are read for each quarter, whether they are all needed or not: the last values are read from a copy.
  void next(Cell& cell) {
    if (end - values >= kCellBytes) {
      expand(values, cell);
    } else {
      uint8_t last[kCellBytes] = {};
      __builtin_memcpy(last, values, end - values);
      expand(last, cell);
    }
    values += __builtin_popcountll(bits()) * sizeof(Value);
    mask += kMaskBytes;
  }

 private:
  uint64_t bits() const { return sizeof(Value) == 2 ? read<uint32_t>(mask) : read<uint64_t>(mask); }

  void expand(const uint8_t* from, Cell& cell) const {
    const uint64_t all = bits();
    Vector::Quarter quarters[kQuarters];
    for (int q = 0; q < kQuarters; ++q) {
      const int first = q * kQuarterBits;
      const int before = __builtin_popcountll(all & ((1ull << first) - 1));
      const uint8_t low = all >> first, high = all >> (first + 8);
      const Vector::Quarter places = sizeof(Value) == 2
                                         ? Vector::load_quarter(tables.words[low].low)
                                         : Vector::joined(tables.bytes[low].low, tables.bytes[high].low);
      quarters[q] = Vector::picked(Vector::load_quarter(from + before * sizeof(Value)), places);
    }
    for (int part = 0; part < kParts; ++part) cell.weights[part] = Vector::whole(quarters + part * kQuarters / kParts);
  }
};

template <class Value>
struct TwoOfFour : Neighbours {
  static constexpr bool kPlaced = true;
  static constexpr int kColumns = 2 * kCellBytes / kStrip / sizeof(Value);
  static constexpr int kPlaceBytes = kCellBytes / sizeof(Value) / 4;
  const uint8_t *values, *place;
  TwoOfFour(const Matrix& m, int64_t strip)
      : Neighbours{kept_cells_of(m), kGroup / kColumns, kColumns},
        values(static_cast<const uint8_t*>(m.weight) + strip * kept_cells_of(m) * kCellBytes),
        place(static_cast<const uint8_t*>(m.index) + strip * kept_cells_of(m) * kPlaceBytes) {}
  void next(Cell& cell) {
    load(values, cell);
    for (int part = 0; part < kParts; ++part) {
      const uint8_t* from = place + part * kPlaceBytes / kParts;
      cell.places[part] = sizeof(Value) == 2 ? Vector::places_of_words(from) : Vector::places_of_bytes(from);
    }
    place += kPlaceBytes;
  }
};

template <class Value>
struct Tiles {
  static constexpr bool kPlaced = false;
  static constexpr int kColumns = kCellBytes / kStrip / sizeof(Value);
  static constexpr int kCells = kTile / kColumns;
  const uint8_t* values;
  const int32_t *tile, *end;
  Tiles(const Matrix& m, int64_t strip)
      : values(static_cast<const uint8_t*>(m.weight) + m.start[strip] * kCells * kCellBytes),
        tile(static_cast<const int32_t*>(m.index) + m.start[strip]),
        end(static_cast<const int32_t*>(m.index) + m.start[strip + 1]) {}
  bool next_run(Run& run) {
    if (tile == end) return false;
    run = {static_cast<int64_t>(*tile++) * kTile, kCells};
    return true;
  }
  void next(Cell& cell) { load(values, cell); }
};

}  // namespace
}  // namespace prunus
