// NEON, the instructions that every 64-bit ARM processor has; with PRUNUS_DOT also its products of bytes (most since 2018).
#include <arm_neon.h>

#include "matrix.h"

namespace prunus {
namespace {

// Four rows.
struct Vector {
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  using Quarter = uint8x16_t;
  static constexpr int kRows = 4;

  static Ints as_ints(Quarter bytes) { return vreinterpretq_s32_u8(bytes); }
  static Quarter as_bytes(Ints values) { return vreinterpretq_u8_s32(values); }

  static Ints load(const void* from) { return as_ints(load_quarter(from)); }
  static void store(void* to, Ints values) { vst1q_u8(static_cast<uint8_t*>(to), as_bytes(values)); }
  static Ints none() { return vdupq_n_s32(0); }

  static Quarter load_quarter(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }
  // Places of sixteen values: those of the first eight, and those of the next eight moved by how many came before.
  static Quarter joined(const uint8_t* first, const uint8_t* second) {
    return vaddq_u8(vld1q_u8(first), vcombine_u8(vdup_n_u8(0), vld1_u8(second)));
  }
  static Quarter picked(Quarter values, Quarter places) { return vqtbl1q_u8(values, places); }
  static Ints whole(const Quarter* quarters) { return as_ints(quarters[0]); }

  static Floats same(float value) { return vdupq_n_f32(value); }
  static Floats even(Ints weights) { return vreinterpretq_f32_s32(vshlq_n_s32(weights, 16)); }
  static Floats odd(Ints weights) {
    return vreinterpretq_f32_s32(vandq_s32(weights, vdupq_n_s32(static_cast<int>(0xffff0000))));
  }
  static Floats sum(Floats before, Floats weights, Floats x) { return vfmaq_f32(before, weights, x); }
  static Floats sum(Floats one, Floats other) { return vaddq_f32(one, other); }
  static Floats as_floats(Ints values) { return vcvtq_f32_s32(values); }
  static void store(float* to, Floats values) { vst1q_f32(to, values); }

  // Two places of two bits for each row.
  static Ints places_of_words(const uint8_t* from) {
    const int32_t shifts[] = {0, -4, -8, -12};
    const uint32x4_t bits = vdupq_n_u32(from[0] | from[1] << 8);
    return vreinterpretq_s32_u32(vshlq_u32(bits, vld1q_s32(shifts)));
  }
  // The four bytes of the one of four floats that the lowest two bits of each row name.
  static Floats placed(Quarter four, Ints places) {
    const Ints first = vmulq_n_s32(vandq_s32(places, vdupq_n_s32(3)), 0x04040404);
    const Ints bytes = vaddq_s32(first, vdupq_n_s32(0x03020100));
    return vreinterpretq_f32_u8(vqtbl1q_u8(four, as_bytes(bytes)));
  }
  static void placed_words(const float* x, Ints places, Floats& even, Floats& odd) {
    const Quarter four = vreinterpretq_u8_f32(vld1q_f32(x));
    even = placed(four, places);
    odd = placed(four, vshrq_n_s32(places, 2));
  }

  // Four places of two bits for each row, spread over its four bytes; the last two are among the second four inputs.
  static Ints places_of_bytes(const uint8_t* from) {
    uint32_t rows;
    __builtin_memcpy(&rows, from, sizeof rows);
    const Ints row = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(rows)))));
    const Ints two = vorrq_s32(row, vshlq_n_s32(row, 12));
    const Ints four = vorrq_s32(two, vshlq_n_s32(two, 6));
    return vorrq_s32(vandq_s32(four, vdupq_n_s32(0x03030303)), vdupq_n_s32(0x04040000));
  }
  static Ints placed_bytes(const int8_t* x, Ints places) {
    const uint8x8_t eight = vreinterpret_u8_s8(vld1_s8(x));
    return as_ints(vqtbl1q_u8(vcombine_u8(eight, eight), as_bytes(places)));
  }
  static Ints same_bytes(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return vdupq_n_s32(four);
  }
  static Ints dot(Ints before, Ints weights, Ints x) {
    const int8x16_t a = vreinterpretq_s8_s32(weights), b = vreinterpretq_s8_s32(x);
#if defined(PRUNUS_DOT)
    return vdotq_s32(before, a, b);
#else
    // two products of bytes at a time fit sixteen bits
    const int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return vpadalq_s16(before, pairs);
#endif
  }
};

}  // namespace
}  // namespace prunus

#include "table.inl"
