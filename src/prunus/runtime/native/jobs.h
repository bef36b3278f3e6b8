// What all threads do together. Each takes its next share until none is left.
#pragma once
#include <algorithm>
#include <atomic>

#include "inputs.h"
#include "levels.h"
#include "numbers.h"
#include "threads.h"

namespace prunus {

inline void store(void* to, int64_t index, Type type, float value) {
  if (type == kFloat32)
    static_cast<float*>(to)[index] = value;
  else
    static_cast<uint16_t*>(to)[index] = narrowed(value);
}

// A product of several matrices with the same inputs. Threads take strips until none is left; a strip is always
// computed by one thread in one order, so the result does not depend on how many there are.
struct Product {
  const Matrix* matrices;
  int count;
  Given given;
  void* const* out;
  const Kernels& code;
  Inputs inputs;
  int64_t strips;
  int threads;
  std::atomic<int64_t> next{0};

  void run() {
    for (int64_t first, end; take(first, end);)
      for (int64_t strip = first; strip < end; ++strip) one(strip);
  }

  // Many strips while many are left, one at the end: threads read on where they are, and end together.
  bool take(int64_t& first, int64_t& end) {
    first = next.load();
    do {
      if (first >= strips) return false;
      end = first + std::max<int64_t>(1, (strips - first) / (4 * threads));
    } while (!next.compare_exchange_weak(first, end));
    return true;
  }

  void one(int64_t strip) {
    int which = 0;
    while (strip >= strips_of(matrices[which])) strip -= strips_of(matrices[which++]);
    const Matrix& m = matrices[which];
    float sums[kMaxBatch][kStrip];
    for (int64_t b = 0; b < given.batch; b += kMaxBatch) {
      const int batch = static_cast<int>(std::min<int64_t>(kMaxBatch, given.batch - b));
      code.product(m, strip, from(inputs, b), batch, sums);
      const int rows = static_cast<int>(std::min<int64_t>(kStrip, m.rows - strip * kStrip));
      for (int k = 0; k < batch; ++k)
        for (int r = 0; r < rows; ++r) {
          const int64_t row = strip * kStrip + r;
          store(out[which], (b + k) * m.rows + row, given.type, sums[k][r] * (m.scale ? m.scale[row] : 1.0f));
        }
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
  int64_t strips = 0;
  for (int i = 0; i < count; ++i) {
    (matrices[i].type == kInt8 ? for_int8 : for_bfloat16) = true;
    strips += strips_of(matrices[i]);
  }
  const PreparedInputs prepared(given, for_bfloat16, for_int8, code);
  Product product{matrices, count, given, out, code, prepared.inputs(), strips, threads};
  in_parallel(product, threads);
}

}  // namespace prunus
