// What happens to the numbers of one token beside products and attention. Every step rounds where torch rounds.
#pragma once
#include <cstdint>

namespace prunus {

enum Type : int32_t { kBfloat16 = 0, kInt8 = 1, kFloat32 = 2 };

// Root mean square norm; weights are of the type of the row.
struct Norm {
  const void* weight;  // or null: there is no norm
  float epsilon;
};

// Of rows of one type; `out` may be what is read.
struct RowSteps {
  void (*norm)(const void* row, const Norm& norm, int64_t width, void* out);
  // Of one head, in place: its two halves are turned by the angles of `cos` and `sin`, `width` of each.
  void (*rotate)(void* row, const void* cos, const void* sin, int64_t width);
  // silu(gate) * up
  void (*gate)(const void* gate, const void* up, int64_t count, void* out);
  void (*add)(const void* one, const void* other, int64_t count, void* out);
};

struct TokenSteps {
  RowSteps bfloat16, float32;
  // Of each kGroup fp32 numbers the codes of int8 products and their scale; before each kTile codes, and behind the last,
  // 128 times the sum of all that were before.
  void (*round)(const float* numbers, int64_t groups, int8_t* codes, float* scale, uint32_t* offset);
  void (*widen)(const uint16_t* bfloat16, int64_t count, float* out);

  const RowSteps& of(Type type) const { return type == kFloat32 ? float32 : bfloat16; }
};

}  // namespace prunus
