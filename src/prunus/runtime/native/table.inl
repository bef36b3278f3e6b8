// Products on processors that cannot expand bytes by a mask. Whoever includes this has a `Vector`: what a register of that
// processor can do. int8 results are those of the other kernels to the bit: whole numbers, and a tile or group of inputs
// added at a time.
#include "matrix.h"
#include "numbers.h"
#include "table_cells.inl"

namespace prunus {
namespace {

// bfloat16 weights: the two of a row are the halves of a word. Several cells at once hide the latency of a product.
template <class Source, int kBatch>
void floats(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  constexpr int kChains = (kParts == 1 ? 8 : 4) / kBatch;
  Floats sum[kChains][kBatch][kParts];
  for (auto& chain : sum)
    for (auto& input : chain)
      for (auto& part : input) part = Vector::same(0.0f);
  Source source(m, strip);
  auto add = [&](int chain, const float* x) __attribute__((always_inline)) {
    Cell cell;
    source.next(cell);
    for (int part = 0; part < kParts; ++part) {
      const Floats even = Vector::even(cell.weights[part]), odd = Vector::odd(cell.weights[part]);
#pragma GCC unroll 4
      for (int b = 0; b < kBatch; ++b) {
        const float* from = x + b * inputs.stride;
        Floats x_even, x_odd;
        if constexpr (Source::kPlaced)
          Vector::placed_words(from, cell.places[part], x_even, x_odd);
        else
          x_even = Vector::same(from[0]), x_odd = Vector::same(from[1]);
        sum[chain][b][part] = Vector::sum(Vector::sum(sum[chain][b][part], even, x_even), odd, x_odd);
      }
    }
  };
  Run run;
  while (source.next_run(run)) {
    const float* x = inputs.float32 + run.column;
    int cell = 0;
    for (; cell + kChains <= run.cells; cell += kChains)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; ++chain, x += Source::kColumns) add(chain, x);
    for (; cell < run.cells; ++cell, x += Source::kColumns) add(0, x);
  }
  for (int b = 0; b < kBatch; ++b)
    for (int part = 0; part < kParts; ++part) {
      for (int chain = 1; chain < kChains; ++chain) sum[0][b][part] = Vector::sum(sum[0][b][part], sum[chain][b][part]);
      Vector::store(out[b] + part * Vector::kRows, sum[0][b][part]);
    }
}

template <class Source, int kBatch>
void bytes(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  Floats sum[kBatch][kParts];
  for (auto& input : sum)
    for (auto& part : input) part = Vector::same(0.0f);
  Source source(m, strip);
  Run run;
  while (source.next_run(run)) {
    const int8_t* x = inputs.rounded + run.column;
    Ints products[kBatch][kParts];
    for (auto& input : products)
      for (auto& part : input) part = Vector::none();
    for (int count = 0; count < run.cells; ++count, x += Source::kColumns) {
      Cell cell;
      source.next(cell);
#pragma GCC unroll 4
      for (int b = 0; b < kBatch; ++b)
        for (int part = 0; part < kParts; ++part) {
          const int8_t* from = x + b * inputs.stride;
          Ints four;
          if constexpr (Source::kPlaced)
            four = Vector::placed_bytes(from, cell.places[part]);
          else
            four = Vector::same_bytes(from);
          products[b][part] = Vector::dot(products[b][part], cell.weights[part], four);
        }
    }
    for (int b = 0; b < kBatch; ++b) {
      const Floats scale = Vector::same(inputs.scale[b * (inputs.stride / kGroup) + run.column / kGroup]);
      for (int part = 0; part < kParts; ++part)
        sum[b][part] = Vector::sum(sum[b][part], Vector::as_floats(products[b][part]), scale);
    }
  }
  for (int b = 0; b < kBatch; ++b)
    for (int part = 0; part < kParts; ++part) Vector::store(out[b] + part * Vector::kRows, sum[b][part]);
}

template <template <class> class Source, int kBatch>
void product_in(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  if (m.type == kInt8)
    bytes<Source<int8_t>, kBatch>(m, strip, inputs, out);
  else
    floats<Source<uint16_t>, kBatch>(m, strip, inputs, out);
}

template <int kBatch>
void product_of(const Matrix& m, int64_t strip, const Inputs& inputs, float (*out)[kStrip]) {
  switch (m.layout) {
    case kDense: return product_in<Dense, kBatch>(m, strip, inputs, out);
    case kBitmask: return product_in<Bitmask, kBatch>(m, strip, inputs, out);
    case kTwoOfFour: return product_in<TwoOfFour, kBatch>(m, strip, inputs, out);
    default: return product_in<Tiles, kBatch>(m, strip, inputs, out);
  }
}

// Four inputs at once, then two, one: the strip is in the nearest cache from the second time on.
void product(const Matrix& m, int64_t strip, const Inputs& inputs, int batch, float (*out)[kStrip]) {
  int done = 0;
  for (; batch - done >= 4; done += 4) product_of<4>(m, strip, from(inputs, done), out + done);
  if (batch & 2) product_of<2>(m, strip, from(inputs, done), out + done), done += 2;
  if (batch & 1) product_of<1>(m, strip, from(inputs, done), out + done);
}

inline float weight_of(uint16_t value, const Matrix&, int64_t) { return widened(value); }
inline float weight_of(int8_t value, const Matrix& m, int64_t row) { return value * m.scale[row]; }

template <class Value>
inline void put(const Matrix& m, int64_t row, const Value* values, int64_t count, Type type, void* out) {
  if (type == kFloat32)
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = weight_of(values[i], m, row);
  else if (sizeof(Value) == 2)
    __builtin_memcpy(out, values, count * 2);
  else
    for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(out)[i] = narrowed(weight_of(values[i], m, row));
}

// Values and, for each of them, its place among the kColumns of the cell; these as they are in a row, then.
template <class Value>
inline void put_placed(const Cell& cell, Value (*rows)[kGroup], int64_t column) {
  constexpr int kUnit = kCellBytes / kStrip / sizeof(Value);
  Value values[kStrip * kUnit];
  int32_t places[kStrip];
  for (int part = 0; part < kParts; ++part) {
    Vector::store(reinterpret_cast<char*>(values) + part * kPartBytes, cell.weights[part]);
    Vector::store(reinterpret_cast<char*>(places) + part * kPartBytes, cell.places[part]);
  }
  for (int r = 0; r < kStrip; ++r)
    for (int u = 0; u < kUnit; ++u) {
      const int place = sizeof(Value) == 2 ? places[r] >> (2 * u) & 3 : places[r] >> (8 * u) & 7;
      rows[r][column + place] |= values[r * kUnit + u];
    }
}

// The columns of a run, at most kGroup, are put together row by row.
template <class Source, class Value>
void expand_in(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  constexpr int kUnit = kCellBytes / kStrip / sizeof(Value);
  const int64_t size = type == kFloat32 ? 4 : 2;
  if (m.layout == kTiles) __builtin_memset(out, 0, rows * m.columns * size);
  Source source(m, strip);
  Run run;
  while (source.next_run(run)) {
    Value values[kStrip][kGroup] = {};
    for (int index = 0; index < run.cells; ++index) {
      Cell cell;
      source.next(cell);
      if constexpr (Source::kPlaced) {
        put_placed(cell, values, index * Source::kColumns);
        continue;
      }
      uint32_t words[kStrip];
      for (int part = 0; part < kParts; ++part)
        Vector::store(reinterpret_cast<char*>(words) + part * kPartBytes, cell.weights[part]);
      for (int r = 0; r < kStrip; ++r) __builtin_memcpy(&values[r][index * kUnit], &words[r], sizeof words[r]);
    }
    const int64_t width = run.cells * Source::kColumns, left = m.columns - run.column;
    for (int r = 0; r < rows; ++r) {
      void* to = static_cast<char*>(out) + (r * m.columns + run.column) * size;
      put(m, strip * kStrip + r, values[r], left < width ? left : width, type, to);
    }
  }
}

template <template <class> class Source>
void expand_from(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  if (m.type == kInt8)
    expand_in<Source<int8_t>, int8_t>(m, strip, rows, type, out);
  else
    expand_in<Source<uint16_t>, uint16_t>(m, strip, rows, type, out);
}

void expand(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  switch (m.layout) {
    case kDense: return expand_from<Dense>(m, strip, rows, type, out);
    case kBitmask: return expand_from<Bitmask>(m, strip, rows, type, out);
    case kTwoOfFour: return expand_from<TwoOfFour>(m, strip, rows, type, out);
    default: return expand_from<Tiles>(m, strip, rows, type, out);
  }
}

}  // namespace
}  // namespace prunus
