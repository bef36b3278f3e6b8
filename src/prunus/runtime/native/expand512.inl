// Strips as rows of plain values, in registers of 512 bits: included where AVX-512 with VBMI2 may be used, behind cells512.inl.
namespace prunus {
namespace {

// Sixteen registers of sixteen words, rows for columns.
inline void transpose(__m512i (&x)[kStrip]) {
  __m512i t[kStrip];
  for (int i = 0; i < kStrip; i += 2) {
    t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < kStrip; i += 4) {
    x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// The first `columns` values of a row that one register holds, to `out` on.
inline void put_bfloat16(__m512i row, int64_t columns, Type type, void* out) {
  const __mmask32 wanted = columns >= 32 ? ~0u : (1u << columns) - 1;
  if (type == kBfloat16) return _mm512_mask_storeu_epi16(out, wanted, row);
  float* to = static_cast<float*>(out);
  const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16);
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16);
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(wanted), _mm512_castsi512_ps(low));
  _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(wanted >> 16), _mm512_castsi512_ps(high));
}

inline void put_int8(__m512i row, int64_t columns, float scale, Type type, void* out) {
  const __m128i quarters[4] = {_mm512_castsi512_si128(row), _mm512_extracti32x4_epi32(row, 1),
                               _mm512_extracti32x4_epi32(row, 2), _mm512_extracti32x4_epi32(row, 3)};
  for (int q = 0; q < 4 && 16 * q < columns; ++q) {
    const int64_t here = columns - 16 * q;
    const __mmask16 wanted = here >= 16 ? 0xffff : (1u << here) - 1;
    const __m512 values = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quarters[q])), _mm512_set1_ps(scale));
    if (type == kFloat32)
      _mm512_mask_storeu_ps(static_cast<float*>(out) + 16 * q, wanted, values);
    else
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + 16 * q, wanted,
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)));
  }
}

template <class Source, int kValueBytes>
void expand_in(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  using AllSteps = Steps<Source, kValueBytes>;
  const int64_t size = type == kFloat32 ? 4 : 2;
  if (Source::kWhole) __builtin_memset(out, 0, rows * m.columns * size);
  AllSteps steps(m, strip);
  Step step;
  while (steps.next(step)) {
    const __m512i* cells = static_cast<const __m512i*>(step.weights);
    __m512i x[kStrip];
    for (int i = 0; i < kStrip; ++i) x[i] = i < AllSteps::kCells ? _mm512_loadu_si512(cells + i) : _mm512_setzero_si512();
    transpose(x);
    const int64_t width = AllSteps::kCells * AllSteps::kUnit, left = m.columns - step.column;
    const int64_t columns = left < width ? left : width;
    for (int r = 0; r < rows; ++r) {
      void* to = static_cast<char*>(out) + (r * m.columns + step.column) * size;
      if constexpr (kValueBytes == 2)
        put_bfloat16(x[r], columns, type, to);
      else
        put_int8(x[r], columns, m.scale[strip * kStrip + r], type, to);
    }
  }
}

void expand(const Matrix& m, int64_t strip, int rows, Type type, void* out) {
  const bool small = m.type == kInt8;
  switch (m.layout) {
    case kDense: return (small ? expand_in<Dense<false>, 1> : expand_in<Dense<false>, 2>)(m, strip, rows, type, out);
    case kBitmask:
      return (small ? expand_in<Bitmask<uint8_t, uint64_t>, 1>
                    : expand_in<Bitmask<uint16_t, uint32_t>, 2>)(m, strip, rows, type, out);
    case kTwoOfFour: return (small ? expand_in<TwoOfFour<1>, 1> : expand_in<TwoOfFour<2>, 2>)(m, strip, rows, type, out);
    default: return (small ? expand_in<Tiles, 1> : expand_in<Tiles, 2>)(m, strip, rows, type, out);
  }
}

}  // namespace
}  // namespace prunus
