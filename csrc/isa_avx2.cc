/* AVX2 with FMA and F16C: eight weights at a time, expanded by a table of permutations. */
#include <immintrin.h>

#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"

/* For each byte of the mask: which value goes to each of 8 places; 0x80, which the byte shuffle reads as zero, where none does. */
struct Tables {
  alignas(64) uint8_t bytes[256][16]; /* of 16-bit values */
  alignas(64) uint8_t highs[256][32]; /* of 16-bit values, into the high halves of 32-bit places */
  alignas(64) uint8_t lanes[256][8];  /* of 32-bit values */
  alignas(64) uint8_t places[256][8]; /* the places of the set bits */
};
constexpr Tables make_tables() {
  Tables t = {};
  for (int m = 0; m < 256; ++m) {
    int n = 0;
    for (int i = 0; i < 8; ++i) {
      const bool set = m >> i & 1;
      t.bytes[m][2 * i] = static_cast<uint8_t>(set ? 2 * n : 0x80);
      t.bytes[m][2 * i + 1] = static_cast<uint8_t>(set ? 2 * n + 1 : 0x80);
      t.highs[m][4 * i] = t.highs[m][4 * i + 1] = 0x80;
      t.highs[m][4 * i + 2] = t.bytes[m][2 * i];
      t.highs[m][4 * i + 3] = t.bytes[m][2 * i + 1];
      t.lanes[m][i] = static_cast<uint8_t>(set ? n : 0x80);
      if (set) t.places[m][n++] = static_cast<uint8_t>(i);
    }
  }
  return t;
}
constexpr Tables TABLES = make_tables();

/* byte v of a word, times the size of a table's row: the offset of that row, with as many set bits as the byte has */
template <int SIZE>
inline uint64_t row_of(uint64_t bits, int v) {
  constexpr int shift = SIZE == 32 ? 5 : SIZE == 16 ? 4 : 3;
  return (v ? bits >> (8 * v - shift) : bits << shift) & (uint64_t{255} << shift);
}
inline const __m128i* at(const void* table, uint64_t offset) {
  return reinterpret_cast<const __m128i*>(static_cast<const char*>(table) + offset);
}

struct Floats {
  static constexpr bool spreads = true;
  using element = float;
  using Vector = __m256;
  using Sum = __m256;
  static constexpr int lanes = 8, sums = 8;
  static Vector load(const element* from) { return _mm256_loadu_ps(from); }
  static void store(element* to, Vector v) { _mm256_storeu_ps(to, v); }
  static Vector splat(const element* from) { return _mm256_broadcast_ss(from); }
  static Sum madd(Sum sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum load_sum(const float* from) { return _mm256_loadu_ps(from); }
  static void store_sum(float* to, Sum sum) { _mm256_storeu_ps(to, sum); }
  static float reduce(Sum sum) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static Sum plus(Sum a, Sum b) { return _mm256_add_ps(a, b); }
  static constexpr int columns = 3;
  /* sums, one row of x and one weight: 12 + 3 + 1 of 16 registers */
  static constexpr int rows(int c) { return c == 3 ? 4 : c == 2 ? 6 : 8; }
  static void keep(Sum& sum) { asm volatile("" : "+x"(sum)); }
  struct Places {
    __m128i now;
    void advance(const char* distances, uint16_t* inputs) {
      now = _mm_add_epi16(now, _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(distances))));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(inputs), now);
    }
  };
  /* eight loads: the gather instruction takes 40 operations on Zen, and far more where microcode guards it against leaks */
  static Vector fetch(const element* x, const uint16_t* inputs) {
    const auto four = [x](const uint16_t* p) {
      __m128 v = _mm_load_ss(x + p[0]);
      v = _mm_insert_ps(v, _mm_load_ss(x + p[1]), 0x10);
      v = _mm_insert_ps(v, _mm_load_ss(x + p[2]), 0x20);
      return _mm_insert_ps(v, _mm_load_ss(x + p[3]), 0x30);
    };
    return _mm256_set_m128(four(inputs + 4), four(inputs));
  }
  static void positions(uint64_t bits, uint8_t base, uint8_t* out) {
    for (int b = 0; b < 8; ++b) {
      const uint8_t part = static_cast<uint8_t>(bits >> 8 * b);
      const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(TABLES.places[part]));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_add_epi8(places, _mm_set1_epi8(static_cast<char>(base + 8 * b))));
      out += __builtin_popcount(part);
    }
  }
};

template <class Math, class value>
inline void spread_word(uint64_t bits, const value* values, __m256* out) {
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) {
    const uint64_t part = Math::part(bits, v);
    out[v] = Math::spread(part, values);
    values += __builtin_popcountll(part);
  }
}

template <class Half>
struct Halves : Floats {
  using value = uint16_t;
  static constexpr bool element_is_value = false, rows_alone = true;
  static void expand(uint64_t bits, const value* values, Vector* out) { spread_word<Half>(bits, values, out); }
  static void dense(const value* values, Vector* out) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) out[v] = Half::wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 8 * v)));
  }
  static Vector listed(const char* from) { return Half::wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static void widen(const value* values, int n, float* out) {
    for (int i = 0; i < n; i += 8)
      _mm256_storeu_ps(out + i, Half::wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i))));
  }
};

struct Bf16 : Halves<Bf16> {
  /* both 16-byte halves hold the next values; one shuffle moves them into the high halves of floats */
  static uint64_t part(uint64_t bits, int v) { return row_of<32>(bits, v); }
  static Vector spread(uint64_t part, const value* from) {
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, *reinterpret_cast<const __m256i*>(at(TABLES.highs, part))));
  }
  static Vector wide(__m128i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16)); }
  static element to_element(value v) { return bf16_to_float(v); }
  static float to_float(value v) { return bf16_to_float(v); }
  static value from_float(float x) { return bf16_from_float(x); }
  static void narrow(const float* sums, int64_t n, value* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float(sums[i]);
  }
};

struct Fp16 : Halves<Fp16> {
  static uint64_t part(uint64_t bits, int v) { return row_of<16>(bits, v); }
  static Vector spread(uint64_t part, const value* from) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return wide(_mm_shuffle_epi8(v, *at(TABLES.bytes, part)));
  }
  static Vector wide(__m128i v) { return _mm256_cvtph_ps(v); }
  static element to_element(value v) { return _cvtsh_ss(v); }
  static float to_float(value v) { return _cvtsh_ss(v); }
  static value from_float(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  static void narrow(const float* sums, int64_t n, value* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float(sums[i]);
  }
};

struct Fp32 : Floats {
  using value = float;
  static constexpr bool element_is_value = true, rows_alone = false;
  static uint64_t part(uint64_t bits, int v) { return row_of<8>(bits, v); }
  static Vector spread(uint64_t part, const value* from) {
    /* the permutation reads the low bits of a place, the blend its sign bit */
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(at(TABLES.lanes, part)));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(_mm256_loadu_ps(from), places), _mm256_setzero_ps(), _mm256_castsi256_ps(places));
  }
  static void expand(uint64_t bits, const value* values, Vector* out) { spread_word<Fp32>(bits, values, out); }
  static void dense(const value* values, Vector* out) {
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) out[v] = _mm256_loadu_ps(values + 8 * v);
  }
  static Vector listed(const char* from) { return _mm256_loadu_ps(reinterpret_cast<const float*>(from)); }
  static void widen(const value* values, int n, float* out) {
    for (int i = 0; i < n; i += 8) _mm256_storeu_ps(out + i, _mm256_loadu_ps(values + i));
  }
  static element to_element(value v) { return v; }
  static float to_float(value v) { return v; }
  static value from_float(float x) { return x; }
  static void narrow(const float* sums, int64_t n, value* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float(sums[i]);
  }
};
}  // namespace

SECATEURS_STREAM(bitmask_bf16_avx2_stream, Bf16)
SECATEURS_STREAM(bitmask_fp16_avx2_stream, Fp16)
SECATEURS_STREAM(bitmask_fp32_avx2_stream, Fp32)
SECATEURS_GATHER(bitmask_bf16_avx2_gather, Bf16)
SECATEURS_GATHER(bitmask_fp16_avx2_gather, Fp16)
SECATEURS_GATHER(bitmask_fp32_avx2_gather, Fp32)
SECATEURS_TILE(bitmask_bf16_avx2_tile, Bf16)
SECATEURS_TILE(bitmask_fp16_avx2_tile, Fp16)
SECATEURS_TILE(bitmask_fp32_avx2_tile, Fp32)
SECATEURS_SKIP(bitmask_bf16_avx2_skip, Bf16)
SECATEURS_SKIP(bitmask_fp16_avx2_skip, Fp16)
SECATEURS_SKIP(bitmask_fp32_avx2_skip, Fp32)
SECATEURS_DENSE(dense_bf16_avx2_stream, Bf16)
SECATEURS_DENSE(dense_fp16_avx2_stream, Fp16)
SECATEURS_DENSE(dense_fp32_avx2_stream, Fp32)
SECATEURS_DENSE_TILE(dense_bf16_avx2_tile, Bf16)
SECATEURS_DENSE_TILE(dense_fp16_avx2_tile, Fp16)
SECATEURS_DENSE_TILE(dense_fp32_avx2_tile, Fp32)
