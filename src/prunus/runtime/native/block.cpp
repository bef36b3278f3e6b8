#include "block.h"

#include <memory>

#include "jobs.h"

namespace prunus {
namespace {

// Rows of one type in memory of their own or of somebody else's.
struct Rows {
  const Kernels& code;
  Type type;
  const RowSteps& steps;
  int64_t batch, threads;

  int64_t bytes(int64_t width) const { return width * (type == kFloat32 ? sizeof(float) : sizeof(uint16_t)); }
  std::unique_ptr<char[]> scratch(int64_t width) const {
    return std::unique_ptr<char[]>(new char[batch * bytes(width)]);
  }
  void* at(void* rows, int64_t index, int64_t width) const { return static_cast<char*>(rows) + index * bytes(width); }
  const void* at(const void* rows, int64_t index, int64_t width) const {
    return static_cast<const char*>(rows) + index * bytes(width);
  }

  void norm(const void* rows, const Norm& norm, int64_t width, void* out, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) steps.norm(at(rows, i, width), norm, width, at(out, i, width));
  }
  void product(const Matrix* matrices, int count, const void* const* bias, const void* rows, void* const* out) const {
    multiply(code, matrices, count, {rows, type, batch, matrices[0].columns}, out, static_cast<int>(threads));
    for (int i = 0; i < count; ++i)
      for (int64_t b = 0; bias[i] && b < batch; ++b) {
        void* const row = at(out[i], b, matrices[i].rows);
        steps.add(row, bias[i], matrices[i].rows, row);
      }
  }
};

Rows rows_of(const Kernels& code, int32_t type, int64_t batch, int64_t threads) {
  return {code, static_cast<Type>(type), code.rows.of(static_cast<Type>(type)), batch, threads};
}

}  // namespace

void project(const Kernels& code, const Projection& p, int threads) {
  const Rows rows = rows_of(code, p.type, p.batch, threads);
  const auto normed = rows.scratch(p.width);
  rows.norm(p.hidden, p.norm, p.width, normed.get(), p.batch);
  rows.product(p.matrices, 3, p.bias, normed.get(), p.out);
  for (int i = 0; i < 2; ++i) {
    const Norm& norm = i ? p.key_norm : p.query_norm;
    const int64_t heads = p.matrices[i].rows / p.head_width;
    if (norm.weight) rows.norm(p.out[i], norm, p.head_width, p.out[i], p.batch * heads);
    for (int64_t head = 0; head < p.batch * heads; ++head) {
      const int64_t before = head / heads * p.angles;
      rows.steps.rotate(rows.at(p.out[i], head, p.head_width), rows.at(p.cos, before, 1), rows.at(p.sin, before, 1),
                        p.head_width);
    }
  }
}

void complete(const Kernels& code, const Completion& c, int threads) {
  const Rows rows = rows_of(code, c.type, c.batch, threads);
  const int64_t inner = c.matrices[1].rows, all = c.batch * c.width;
  const auto after = rows.scratch(c.width), normed = rows.scratch(c.width);
  const auto gate = rows.scratch(inner), up = rows.scratch(inner);
  void* const attended[] = {after.get()};
  rows.product(c.matrices, 1, c.bias, c.attended, attended);
  rows.steps.add(c.hidden, after.get(), all, after.get());
  rows.norm(after.get(), c.norm, c.width, normed.get(), c.batch);
  void* const inside[] = {gate.get(), up.get()};
  rows.product(c.matrices + 1, 2, c.bias + 1, normed.get(), inside);
  rows.steps.gate(gate.get(), up.get(), c.batch * inner, gate.get());
  rows.product(c.matrices + 3, 1, c.bias + 3, gate.get(), &c.out);
  rows.steps.add(after.get(), c.out, all, c.out);
}

}  // namespace prunus
