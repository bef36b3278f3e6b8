// What all threads do together. Each takes its next share until none is left.
#pragma once
#include <algorithm>
#include <atomic>

#include "inputs.h"
#include "levels.h"
#include "numbers.h"
#include "shares.h"
#include "threads.h"

namespace prunus {

inline void store(const float* values, int count, Type type, void* to, int64_t index) {
  if (type == kFloat32)
    std::copy_n(values, count, static_cast<float*>(to) + index);
  else
    std::transform(values, values + count, static_cast<uint16_t*>(to) + index, narrowed);
}

// A product of several matrices with the same inputs. A strip is always computed by one thread in one order, so the result
// does not depend on how many there are. Where kernels take two strips at once, these are half of all strips apart, and
// each thread reads onwards in two places: what comes from memory at a time is limited for each place that is read.
struct Product {
  const Matrix* matrices;
  int count;
  Given given;
  void* const* out;
  const Kernels& code;
  Inputs inputs;
  int64_t strips, apart;  // apart: 0 where strips are taken one by one
  Shares shares;

  Product(const Kernels& code, const Matrix* matrices, int count, const Given& given, const Inputs& inputs,
          void* const* out, int threads)
      : matrices(matrices), count(count), given(given), out(out), code(code), inputs(inputs), strips(all_strips()),
        apart(in_pairs() ? (strips + 1) / 2 : 0), shares(apart ? apart : strips, threads) {}

  void run() {
    const int thread = shares.join();
    Place here, there;
    for (int64_t unit; shares.take(thread, unit);)
      if (apart && unit + apart < strips)
        two(at(unit, here), at(unit + apart, there));
      else
        one(at(unit, here));
  }

 private:
  int64_t all_strips() const {
    int64_t all = 0;
    for (int i = 0; i < count; ++i) all += strips_of(matrices[i]);
    return all;
  }

  bool in_pairs() const {
    bool alike = code.two && given.batch == 1 && matrices[0].layout != kTiles;
    for (int i = 1; i < count; ++i)
      alike = alike && matrices[i].layout == matrices[0].layout && matrices[i].type == matrices[0].type;
    return alike;
  }

  // The matrix of the last strip, whose first one was `before`: the next is mostly of the same.
  struct Place {
    int which = 0;
    int64_t before = 0;
  };

  Strip at(int64_t index, Place& place) const {
    if (index < place.before) place = {};
    while (index - place.before >= strips_of(matrices[place.which])) place.before += strips_of(matrices[place.which++]);
    return {matrices[place.which], index - place.before, out[place.which]};
  }

  void two(const Strip& first, const Strip& second) const {
    float sums[2][kStrip];
    code.two(first, second, inputs, sums);
    put(first, 0, 1, sums);
    put(second, 0, 1, sums + 1);
  }

  void one(const Strip& strip) const {
    float sums[kMaxBatch][kStrip];
    for (int64_t b = 0; b < given.batch; b += kMaxBatch) {
      const int batch = static_cast<int>(std::min<int64_t>(kMaxBatch, given.batch - b));
      code.product(strip.matrix, strip.index, from(inputs, b), batch, sums);
      put(strip, b, batch, sums);
    }
  }

  void put(const Strip& strip, int64_t first, int batch, const float (*sums)[kStrip]) const {
    const Matrix& m = strip.matrix;
    const int64_t row = strip.index * kStrip;
    const int rows = static_cast<int>(std::min<int64_t>(kStrip, m.rows - row));
    for (int k = 0; k < batch; ++k) {
      float scaled[kStrip];
      for (int r = 0; r < rows; ++r) scaled[r] = sums[k][r] * (m.scale ? m.scale[row + r] : 1.0f);
      store(scaled, rows, given.type, strip.out, (first + k) * m.rows + row);
    }
  }
};

// Heads of one group at a time, a few of them.
struct Attending {
  const Attention& attention;
  const Kernels& code;
  std::atomic<int64_t> next{0};

  void run() {
    const int64_t per_group = attention.heads / attention.groups, parts = (per_group + kHeads - 1) / kHeads;
    const int64_t all = attention.batch * attention.groups * parts;
    for (int64_t one; (one = next.fetch_add(1)) < all;) {
      const int64_t first = one % parts * kHeads, group = one / parts % attention.groups;
      const int count = static_cast<int>(std::min<int64_t>(kHeads, per_group - first));
      code.attend(attention, one / parts / attention.groups, group * per_group + first, count);
    }
  }
};

template <class Job>
void in_parallel(Job& job, int threads) {
  parallel(threads, [](void* argument) { static_cast<Job*>(argument)->run(); }, &job);
}

inline void multiply(const Kernels& code, const Matrix* matrices, int count, const Given& given, void* const* out,
                     int threads) {
  bool for_bfloat16 = false, for_int8 = false;
  for (int i = 0; i < count; ++i) (matrices[i].type == kInt8 ? for_int8 : for_bfloat16) = true;
  const PreparedInputs prepared(given, for_bfloat16, for_int8, code);
  Product product(code, matrices, count, given, prepared.inputs(), out, threads);
  in_parallel(product, threads);
}

}  // namespace prunus
