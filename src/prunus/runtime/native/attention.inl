// Attention in the compiler's own vectors. Scores, sums and the softmax are fp32, whatever the type of keys and values.
#include "attention.h"
#include "lanes.inl"
#include "matrix.h"

namespace prunus {
namespace {

// The heads' sums over the positions so far, to be divided by `total`; scores are relative to the `largest` of them.
struct HeadSums {
  float query[kHeads][kMaxWidth], sum[kHeads][kMaxWidth], largest[kHeads], total[kHeads];
};

// Scores of positions `first` on; those masked out are -infinity.
template <class Value, int kCount>
inline void scores_of(const Attention& a, const HeadSums& heads, const Value* key, const uint8_t* mask, int positions,
                      float (*score)[kPositions]) {
  const int64_t whole = a.width / kLanes * kLanes;
  for (int t = 0; t < positions; ++t, key += a.key_position) {
    Lanes lanes[kCount] = {}, query, numbers;
    for (int64_t d = 0; d < whole; d += kLanes) {
      load(key + d, numbers);
#pragma GCC unroll 4
      for (int h = 0; h < kCount; ++h) {
        load(heads.query[h] + d, query);
        lanes[h] += query * numbers;
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kCount; ++h) {
      float sum = sum_of(lanes[h]);
      for (int64_t d = whole; d < a.width; ++d) sum += heads.query[h][d] * number(key[d]);
      score[h][t] = mask && !mask[t] ? -__builtin_inff() : sum;
    }
  }
}

// Scores become weights; what was summed before is brought to the new largest score.
inline void weigh(HeadSums& heads, int h, int positions, float* score) {
  for (int t = positions; t % kLanes; ++t) score[t] = -__builtin_inff();
  Lanes lanes, largest = Lanes{} + heads.largest[h], total = {};
  for (int t = 0; t < positions; t += kLanes) {
    load(score + t, lanes);
    largest = lanes > largest ? lanes : largest;
  }
  const float before = heads.largest[h], now = largest_of(largest);
  const Lanes above = Lanes{} + (now == -__builtin_inff() ? 0.0f : now);  // nothing was looked at so far
  for (int t = 0; t < positions; t += kLanes) {
    load(score + t, lanes);
    lanes = exponential(lanes - above);
    total += lanes;
    __builtin_memcpy(score + t, &lanes, sizeof lanes);
  }
  const float left = exponential(Lanes{} + before - above)[0];
  heads.total[h] = heads.total[h] * left + sum_of(total);
  for (float& sum : heads.sum[h]) sum *= left;
  heads.largest[h] = now;
}

template <class Value, int kCount>
inline void add_values(const Attention& a, HeadSums& heads, const Value* value, int positions,
                       const float (*weight)[kPositions]) {
  const int64_t whole = a.width / kLanes * kLanes;
  for (int64_t d = 0; d < whole; d += kLanes) {
    Lanes lanes[kCount], numbers;
#pragma GCC unroll 4
    for (int h = 0; h < kCount; ++h) load(heads.sum[h] + d, lanes[h]);
    const Value* from = value + d;
    for (int t = 0; t < positions; ++t, from += a.value_position) {
      load(from, numbers);
#pragma GCC unroll 4
      for (int h = 0; h < kCount; ++h) lanes[h] += weight[h][t] * numbers;
    }
    for (int h = 0; h < kCount; ++h) __builtin_memcpy(heads.sum[h] + d, &lanes[h], sizeof lanes[h]);
  }
  for (int h = 0; h < kCount; ++h)
    for (int64_t d = whole; d < a.width; ++d)
      for (int t = 0; t < positions; ++t) heads.sum[h][d] += weight[h][t] * number(value[t * a.value_position + d]);
}

template <class Value, int kCount>
void attend_to(const Attention& a, int64_t batch, int64_t head) {
  const int64_t group = head / (a.heads / a.groups);
  const Value* key = static_cast<const Value*>(a.key) + batch * a.key_batch + group * a.key_group;
  const Value* value = static_cast<const Value*>(a.value) + batch * a.value_batch + group * a.value_group;
  const Value* query = static_cast<const Value*>(a.query) + batch * a.query_batch + head * a.query_head;
  HeadSums heads = {};
  for (int h = 0; h < kCount; ++h) {
    heads.largest[h] = -__builtin_inff();
    for (int64_t d = 0; d < a.width; ++d) heads.query[h][d] = number(query[h * a.query_head + d]) * a.scale;
  }
  for (int64_t first = 0; first < a.positions; first += kPositions) {
    const int64_t left = a.positions - first;
    const int positions = static_cast<int>(left < kPositions ? left : kPositions);
    const uint8_t* mask = a.mask ? a.mask + batch * a.mask_batch + first : nullptr;
    float weight[kCount][kPositions];
    scores_of<Value, kCount>(a, heads, key + first * a.key_position, mask, positions, weight);
    for (int h = 0; h < kCount; ++h) weigh(heads, h, positions, weight[h]);
    add_values<Value, kCount>(a, heads, value + first * a.value_position, positions, weight);
  }
  Value* out = static_cast<Value*>(a.out) + (batch * a.heads + head) * a.width;
  for (int h = 0; h < kCount; ++h)
    for (int64_t d = 0; d < a.width; ++d)
      set(out + h * a.width + d, heads.total[h] == 0 ? 0.0f : heads.sum[h][d] / heads.total[h]);
}

template <class Value>
void attend_heads(const Attention& a, int64_t batch, int64_t head, int count) {
  switch (count) {
    case 1: return attend_to<Value, 1>(a, batch, head);
    case 2: return attend_to<Value, 2>(a, batch, head);
    case 3: return attend_to<Value, 3>(a, batch, head);
    default: return attend_to<Value, kHeads>(a, batch, head);
  }
}

void attend(const Attention& a, int64_t batch, int64_t head, int count) {
  if (a.type == kFloat32)
    attend_heads<float>(a, batch, head, count);
  else
    attend_heads<uint16_t>(a, batch, head, count);
}

}  // namespace
}  // namespace prunus
