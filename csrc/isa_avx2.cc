/* AVX2 with FMA and F16C: eight weights at a time, expanded by a table of permutations. Integers: products of bytes without sign and
   bytes with one, so signed codes give their sign to x. */
#include <immintrin.h>

#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"
#include "integers.h"
#include "block.h"

/* For each byte of the mask: which value goes to each of 8 places; 0x80, which the byte shuffle reads as zero, where none does. */
struct Tables {
  alignas(64) uint8_t bytes[256][16]; /* of 16-bit values */
  alignas(64) uint8_t highs[256][32]; /* of 16-bit values, into the high halves of 32-bit places */
  alignas(64) uint8_t lanes[256][8];  /* of 32-bit values */
  alignas(64) uint8_t codes[256][16]; /* of bytes, to 8 places; 0x80 for the others */
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
      t.lanes[m][i] = t.codes[m][i] = static_cast<uint8_t>(set ? n : 0x80);
      t.codes[m][8 + i] = 0x80;
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

struct Whole : Without {
  static constexpr bool fours = true;
  struct Bytes {
    __m256i at[2];
  };
  /* SIGNED: sums of four products in 32 bits; else of two in 16 */
  using Ints = Bytes;
  using Sum = __m256;
  using Lane = __m256i;
  static constexpr int lanes = 8, int_columns = 2;
  static constexpr int int_rows(int) { return 4; }
  static float from_half(uint16_t half) { return _cvtsh_ss(half); }
  static uint16_t to_half(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
  /* two products with codes of 8 bits would not fit 16 bits */
  template <int BITS>
  static constexpr bool signs() {
    return BITS == 8;
  }
  template <int BITS>
  static constexpr bool ahead() {
    return BITS != 8;
  }

  template <int BITS>
  struct Codes {
    int bits;
    __m256i shift;
    Codes(int bits, int shift) : bits(bits), shift(_mm256_set1_epi8(static_cast<char>(shift))) {}
    Bytes get(const uint8_t* from) const {
      Bytes out;
      const __m128i* in = reinterpret_cast<const __m128i*>(from);
      if (BITS == 8) {
        for (int b = 0; b < 2; ++b) out.at[b] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + b);
      } else if (BITS == 4) {
        for (int b = 0; b < 2; ++b) {
          const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(in + b));
          out.at[b] = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
        }
      } else {
        /* eight codes of a group take `bits` bytes */
        const uint64_t places = 0x0101010101010101u * ((uint64_t{1} << bits) - 1);
        const auto eight = [=](int g) {
          uint64_t packed;
          __builtin_memcpy(&packed, from + g * bits, 8);
          return static_cast<int64_t>(_pdep_u64(packed, places));
        };
        for (int b = 0; b < 2; ++b) out.at[b] = _mm256_setr_epi64x(eight(4 * b), eight(4 * b + 1), eight(4 * b + 2), eight(4 * b + 3));
      }
      for (int b = 0; b < 2; ++b) out.at[b] = _mm256_sub_epi8(out.at[b], shift);
      return out;
    }
  };
  static Bytes load(const int8_t* from) {
    const __m256i* in = reinterpret_cast<const __m256i*>(from);
    return {{_mm256_load_si256(in), _mm256_load_si256(in + 1)}};
  }
  static void store(uint8_t* to, const Bytes& bytes) {
    for (int b = 0; b < 2; ++b) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + b, bytes.at[b]);
  }
  static Bytes fill(int low, int high) {
    return {{_mm256_set1_epi8(static_cast<char>(low)), _mm256_set1_epi8(static_cast<char>(high))}};
  }
  /* Eight codes at a time, as floats are. The byte shuffle writes zeros where no weight is stored; codes less `middle` make that the
     code of zero. Codes of 8 bits are as they are stored. */
  template <int BITS, bool ZEROS>
  static Bytes spread(uint64_t kept, const uint8_t* next, const Bytes& fill, int middle) {
    const __m128i less = _mm_set1_epi8(static_cast<char>(middle));
    Bytes out;
#pragma GCC unroll 2
    for (int b = 0; b < 2; ++b) {
      __m128i half[2], empty[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        __m128i part[2], places[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const uint64_t row = row_of<16>(kept, 4 * b + 2 * h + v);
          places[v] = *at(TABLES.codes, row);
          const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(next));
          part[v] = _mm_shuffle_epi8(BITS == 8 || !ZEROS ? _mm_sub_epi8(codes, less) : codes, places[v]);
          next += __builtin_popcountll(row);
        }
        half[h] = _mm_unpacklo_epi64(part[0], part[1]);
        empty[h] = _mm_unpacklo_epi64(places[0], places[1]);
      }
      out.at[b] = _mm256_set_m128i(half[1], half[0]);
      /* the sign bit of a place says that nothing goes there */
      if (ZEROS)
        out.at[b] = _mm256_blendv_epi8(out.at[b], fill.at[b], _mm256_set_m128i(empty[1], empty[0]));
      else if (BITS != 8)
        out.at[b] = _mm256_add_epi8(out.at[b], _mm256_set1_epi8(static_cast<char>(middle)));
    }
    return out;
  }
  static Ints none() { return {{_mm256_setzero_si256(), _mm256_setzero_si256()}}; }
  static __m256i fours_of(__m256i twos) { return _mm256_madd_epi16(twos, _mm256_set1_epi16(1)); }
  template <bool SIGNED>
  static Ints dot(Ints ints, const Bytes& codes, const Bytes& x) {
    for (int b = 0; b < 2; ++b)
      if (SIGNED) {
        const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(codes.at[b]), _mm256_sign_epi8(x.at[b], codes.at[b]));
        ints.at[b] = _mm256_add_epi32(ints.at[b], fours_of(twos));
      } else {
        ints.at[b] = _mm256_add_epi16(ints.at[b], _mm256_maddubs_epi16(codes.at[b], x.at[b]));
      }
    return ints;
  }
  struct Scales {
    __m256 of; /* 4 of the first block, 4 of the second */
    Scales(const uint16_t* low, const uint16_t* high, int32_t half) {
      const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)),
                                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high)));
      of = half ? _mm256_cvtph_ps(both) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(both), 16));
    }
  };
  struct Factors {
    alignas(32) float of[8];
  };
  static Factors factors(const Scales& scales, const float* x) {
    Factors out;
    _mm256_store_ps(out.of, _mm256_mul_ps(scales.of, _mm256_loadu_ps(x + 4)));
    return out;
  }
  static Sum zero() { return _mm256_setzero_ps(); }
  template <bool SIGNED>
  static Sum madd(Sum sum, const Ints& ints, const Factors& factors, int row) {
    for (int b = 0; b < 2; ++b) {
      const __m256i fours = SIGNED ? ints.at[b] : fours_of(ints.at[b]);
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), _mm256_broadcast_ss(factors.of + 4 * b + row), sum);
    }
    return sum;
  }
  static float reduce(Sum sum) { return Floats::reduce(sum); }

  /* Rows are side by side in a register's lower half, which is the first block, and in its upper half: no sum crosses rows. */
  template <int BITS>
  struct Pairs {
    __m256i places[4], codes[4];
    explicit Pairs(const uint8_t* from) {
      const __m256i* in = reinterpret_cast<const __m256i*>(from);
      const __m256i packed = _mm256_loadu_si256(in), three = _mm256_set1_epi8(3), low = _mm256_set1_epi8(15);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        /* a half has 16 inputs of its block, and two fours of those belong to each k */
        const __m256i fours = _mm256_set1_epi32(k % 2 ? 0x0c0c0808 : 0x04040000);
        places[k] = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(packed, 2 * k), three), fours);
        if (BITS == 8) {
          codes[k] = _mm256_loadu_si256(in + 1 + k);
        } else {
          const __m256i both = _mm256_loadu_si256(in + 1 + k / 2);
          codes[k] = _mm256_and_si256(k % 2 ? _mm256_srli_epi16(both, 4) : both, low);
        }
      }
    }
    __m256i dot(const int8_t* x) const {
      __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(x) + k / 2);
        const __m256i here = _mm256_shuffle_epi8(half, places[k]);
        if (BITS == 8) {
          const __m256i twos = _mm256_maddubs_epi16(_mm256_abs_epi8(codes[k]), _mm256_sign_epi8(here, codes[k]));
          sum = _mm256_add_epi32(sum, fours_of(twos));
        } else {
          /* codes are integers plus 8 */
          const __m256i eights = _mm256_maddubs_epi16(_mm256_set1_epi8(8), here);
          sum = _mm256_add_epi16(sum, _mm256_sub_epi16(_mm256_maddubs_epi16(codes[k], here), eights));
        }
      }
      return BITS == 8 ? sum : fours_of(sum);
    }
  };
  using RowSums = __m256;
  static RowSums no_rows() { return _mm256_setzero_ps(); }
  static RowSums madd_pairs(RowSums sums, __m256i ints, const Scales& scales, const float* x) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(ints), _mm256_mul_ps(scales.of, _mm256_loadu_ps(x)), sums);
  }
  static void totals(RowSums sums, float* out) {
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }

  static Lane load_lane(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static Lane times(Lane a, int32_t b) { return _mm256_mullo_epi32(a, _mm256_set1_epi32(b)); }
  struct Four {
    __m256i codes, absolute;
  };
  template <bool SIGNED>
  static Four splat(const uint8_t* from) {
    int four;
    __builtin_memcpy(&four, from, 4);
    const __m256i codes = _mm256_set1_epi32(four);
    return {codes, SIGNED ? _mm256_abs_epi8(codes) : codes};
  }
  template <bool SIGNED>
  static Lane dot4(Lane sum, const Four& four, Lane x) {
    const __m256i twos = _mm256_maddubs_epi16(four.absolute, SIGNED ? _mm256_sign_epi8(x, four.codes) : x);
    return _mm256_add_epi32(sum, fours_of(twos));
  }
  static void add_to(float* sums, Lane part, const float* x, float scale) {
    const __m256 scales = _mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale));
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), scales, _mm256_loadu_ps(sums)));
  }
  static void keep(Lane& sum) { asm volatile("" : "+x"(sum)); }
};
}  // namespace

SECATEURS_INTEGERS(avx2, Whole)
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
SECATEURS_BLOCK(avx2)
