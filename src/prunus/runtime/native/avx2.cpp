// AVX2 with FMA (Intel from Haswell on, AMD from Zen on).
#if defined(__x86_64__)
#define PRUNUS_TARGET "avx2,fma,bmi2,popcnt"
#include "target.h"

#include <immintrin.h>

#include "matrix.h"

namespace prunus {
namespace {

// Eight rows.
struct Vector {
  using Ints = __m256i;
  using Floats = __m256;
  using Quarter = __m128i;
  static constexpr int kRows = 8;

  static Ints load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static Ints none() { return _mm256_setzero_si256(); }

  static Quarter load_quarter(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
  // Places of sixteen values: those of the first eight, and those of the next eight moved by how many came before.
  static Quarter joined(const uint8_t* first, const uint8_t* second) {
    const __m128 high = _mm_loadh_pi(_mm_setzero_ps(), reinterpret_cast<const __m64*>(second));
    return _mm_add_epi8(_mm_castps_si128(high), load_quarter(first));
  }
  static Quarter picked(Quarter values, Quarter places) { return _mm_shuffle_epi8(values, places); }
  static Ints whole(const Quarter* quarters) { return _mm256_set_m128i(quarters[1], quarters[0]); }

  static void store(void* to, Ints values) { _mm256_storeu_si256(static_cast<__m256i*>(to), values); }

  static Floats same(float value) { return _mm256_set1_ps(value); }
  static Floats even(Ints weights) { return _mm256_castsi256_ps(_mm256_slli_epi32(weights, 16)); }
  static Floats odd(Ints weights) {
    return _mm256_castsi256_ps(_mm256_and_si256(weights, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
  }
  static Floats sum(Floats before, Floats weights, Floats x) { return _mm256_fmadd_ps(weights, x, before); }
  static Floats sum(Floats one, Floats other) { return _mm256_add_ps(one, other); }
  static Floats as_floats(Ints values) { return _mm256_cvtepi32_ps(values); }
  static void store(float* to, Floats values) { _mm256_storeu_ps(to, values); }

  // Two places of two bits for each row.
  static Ints places_of_words(const uint8_t* from) {
    int32_t bits;
    __builtin_memcpy(&bits, from, sizeof bits);
    return _mm256_srlv_epi32(_mm256_set1_epi32(bits), _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0));
  }
  static void placed_words(const float* x, Ints places, Floats& even, Floats& odd) {
    const __m256 four = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
    even = _mm256_permutevar_ps(four, places);
    odd = _mm256_permutevar_ps(four, _mm256_srli_epi32(places, 2));
  }

  // Four places of two bits for each row, spread over its four bytes; the last two are among the second four inputs.
  static Ints places_of_bytes(const uint8_t* from) {
    const __m256i row = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    const __m256i two = _mm256_or_si256(row, _mm256_slli_epi32(row, 12));
    const __m256i four = _mm256_or_si256(two, _mm256_slli_epi32(two, 6));
    const __m256i places = _mm256_and_si256(four, _mm256_set1_epi32(0x03030303));
    return _mm256_or_si256(places, _mm256_set1_epi32(0x04040000));
  }
  static Ints placed_bytes(const int8_t* x, Ints places) {
    int64_t eight;
    __builtin_memcpy(&eight, x, sizeof eight);
    return _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), places);
  }
  static Ints same_bytes(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
  }
  // The instruction multiplies unsigned by signed bytes and adds pairs: |weight| times x with the sign of the weight.
  // At most 127 x 127 twice, which sixteen bits hold.
  static Ints dot(Ints before, Ints weights, Ints x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
    return _mm256_add_epi32(before, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace prunus

#define PRUNUS_LANES 8
#include "attention.inl"
#include "rows.inl"
#include "table.inl"

namespace prunus {
const Kernels avx2_kernels = {"avx2", false, product, expand, attend, rows};
}
#include "target_end.h"
#endif
