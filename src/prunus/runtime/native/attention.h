// Attention of one new token over the keys and values of all before it.
#pragma once
#include <cstdint>

namespace prunus {

constexpr int kHeads = 4;         // heads of one group that are computed together: keys and values are read once for them
constexpr int kMaxWidth = 256;    // of a head
constexpr int kPositions = 128;   // that are looked at before sums are brought to a new largest score

// Distances between neighbours are in elements; those within a head are one apart.
struct Attention {
  int32_t type;  // of everything but the mask: bfloat16 or fp32
  int64_t batch, heads, groups, positions, width;
  const void *query, *key, *value;
  int64_t query_batch, query_head;
  int64_t key_batch, key_group, key_position;
  int64_t value_batch, value_group, value_position;
  const uint8_t* mask;  // batch x positions, 0 where nobody looks; or null
  int64_t mask_batch;
  float scale;
  void* out;  // batch x heads x width
};

// `count` heads, at most kHeads, of one batch and one group, from `head` on.
using HeadsAttention = void (*)(const Attention&, int64_t batch, int64_t head, int count);

}  // namespace prunus
