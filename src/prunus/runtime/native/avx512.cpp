// AVX-512 without the instructions that expand bytes (Intel from Skylake-SP to Cascade Lake).
#if defined(__x86_64__)
#define PRUNUS_TARGET "avx2,fma,bmi2,popcnt,avx512f,avx512bw,avx512dq,avx512vl"
#include "target.h"

#include <immintrin.h>

#include "matrix.h"

namespace prunus {
namespace {

// Sixteen rows: a cell.
struct Vector {
  using Ints = __m512i;
  using Floats = __m512;
  using Quarter = __m128i;
  static constexpr int kRows = 16;

  static Ints load(const void* from) { return _mm512_loadu_si512(from); }
  static void store(void* to, Ints values) { _mm512_storeu_si512(to, values); }
  static Ints none() { return _mm512_setzero_si512(); }

  static Quarter load_quarter(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  // Places of sixteen values: those of the first eight, and those of the next eight moved by how many came before.
  static Quarter joined(const uint8_t* first, const uint8_t* second) {
    const __m128 high = _mm_loadh_pi(_mm_setzero_ps(), reinterpret_cast<const __m64*>(second));
    return _mm_add_epi8(_mm_castps_si128(high), load_quarter(first));
  }
  static Quarter picked(Quarter values, Quarter places) { return _mm_shuffle_epi8(values, places); }
  static Ints whole(const Quarter* quarters) {
    const __m256i low = _mm256_set_m128i(quarters[1], quarters[0]), high = _mm256_set_m128i(quarters[3], quarters[2]);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  static Floats same(float value) { return _mm512_set1_ps(value); }
  static Floats even(Ints weights) { return _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)); }
  static Floats odd(Ints weights) {
    return _mm512_castsi512_ps(_mm512_and_si512(weights, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static Floats sum(Floats before, Floats weights, Floats x) { return _mm512_fmadd_ps(weights, x, before); }
  static Floats sum(Floats one, Floats other) { return _mm512_add_ps(one, other); }
  static Floats as_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
  static void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }

  // Two places of two bits for each row.
  static Ints places_of_words(const uint8_t* from) {
    int64_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    const __m512i shifts = _mm512_set_epi64(60, 56, 52, 48, 44, 40, 36, 32), all = _mm512_set1_epi64(bits);
    const __m256i low = _mm512_cvtepi64_epi32(_mm512_srlv_epi64(all, _mm512_sub_epi64(shifts, _mm512_set1_epi64(32))));
    const __m256i high = _mm512_cvtepi64_epi32(_mm512_srlv_epi64(all, shifts));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  static void placed_words(const float* x, Ints places, Floats& even, Floats& odd) {
    const __m512 four = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
    even = _mm512_permutevar_ps(four, places);
    odd = _mm512_permutevar_ps(four, _mm512_srli_epi32(places, 2));
  }

  // Four places of two bits for each row, spread over its four bytes; the last two are among the second four inputs.
  static Ints places_of_bytes(const uint8_t* from) {
    const __m512i row = _mm512_cvtepu8_epi32(load_quarter(from));
    const __m512i two = _mm512_or_si512(row, _mm512_slli_epi32(row, 12));
    const __m512i four = _mm512_or_si512(two, _mm512_slli_epi32(two, 6));
    const __m512i places = _mm512_and_si512(four, _mm512_set1_epi32(0x03030303));
    return _mm512_or_si512(places, _mm512_set1_epi32(0x04040000));
  }
  static Ints placed_bytes(const int8_t* x, Ints places) {
    int64_t eight;
    __builtin_memcpy(&eight, x, sizeof eight);
    return _mm512_shuffle_epi8(_mm512_set1_epi64(eight), places);
  }
  static Ints same_bytes(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }
  // As in AVX2, |weight| times x with the sign of the weight; which here a mask has to give.
  static Ints dot(Ints before, Ints weights, Ints x) {
    const __m512i with_sign = _mm512_mask_sub_epi8(x, _mm512_movepi8_mask(weights), none(), x);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights), with_sign);
    return _mm512_add_epi32(before, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace prunus

#define PRUNUS_LANES 16
#include "attention.inl"
#include "rows.inl"
#include "table.inl"

namespace prunus {
const Kernels avx512_kernels = {"avx512", false, product, expand, attend, rows};
}
#include "target_end.h"
#endif
