/* AVX-512 with VBMI (bytes in any order), VBMI2 (expand bytes and 16-bit elements), VNNI (products of bytes) and BF16 (of pairs). */
#include <immintrin.h>

#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"
#include "integers.h"
#include "block.h"

/* Expands in place. The instruction waits for the old value of its destination, so if the compiler chose another register,
   independent expansions would wait for each other: 11 weights a cycle instead of 18 (Zen 5). From memory it is slower still. */
inline __m512i expand16(__mmask32 keep, const void* from) {
  __m512i v = _mm512_loadu_si512(from);
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(keep));
  return v;
}
inline __m256i expand16_half(__mmask16 keep, const void* from) {
  __m256i v = _mm256_loadu_si256(static_cast<const __m256i*>(from));
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(keep));
  return v;
}
inline __m512i expand32(__mmask16 keep, const void* from) {
  __m512i v = _mm512_loadu_si512(from);
  asm("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(v) : "Yk"(keep));
  return v;
}
inline __m512i compress8(__mmask64 keep, __m512i from) {
  __m512i v = _mm512_setzero_si512();
  asm("vpcompressb %1, %0%{%2%}" : "+v"(v) : "v"(from), "Yk"(keep));
  return v;
}

struct Positions {
  static void positions(uint64_t bits, uint8_t base, uint8_t* out) {
    alignas(64) static constexpr uint8_t count[64] = {
        0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31,
        32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63};
    const __m512i all = _mm512_or_si512(_mm512_load_si512(count), _mm512_set1_epi8(static_cast<char>(base)));
    _mm512_storeu_si512(out, compress8(bits, all));
  }
};

/* round to nearest, ties to even; NaN stays NaN */
inline __m256i bf16_from_floats(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even), 16);
  const __m512i quiet = _mm512_or_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet));
}
inline void narrow_bf16(const float* sums, int64_t n, uint16_t* out) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), bf16_from_floats(_mm512_loadu_ps(sums + i)));
  for (; i < n; ++i) out[i] = bf16_from_float(sums[i]);
}

/* sums of 16 floats */
struct Sums {
  static constexpr bool spreads = false, rows_alone = false;
  using Sum = __m512;
  static constexpr int sums = 16;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum load_sum(const float* from) { return _mm512_loadu_ps(from); }
  static void store_sum(float* to, Sum sum) { _mm512_storeu_ps(to, sum); }
  static float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }
  static Sum plus(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static constexpr int columns = 4;
  /* sums, one row of x and one weight: 24 + 4 + 1 of 32 registers */
  static constexpr int rows(int c) { return c == 4 ? 6 : c == 3 ? 8 : c == 2 ? 12 : 24; }
  static void keep(Sum& sum) { asm volatile("" : "+v"(sum)); }
};

struct Floats : Sums, Positions {
  using element = float;
  using Vector = __m512;
  static constexpr int lanes = 16;
  static Vector load(const element* from) { return _mm512_loadu_ps(from); }
  static void store(element* to, Vector v) { _mm512_storeu_ps(to, v); }
  static Vector splat(const element* from) { return _mm512_set1_ps(*from); }
  static Sum madd(Sum sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
};

struct Fp32 : Floats {
  using value = float;
  static constexpr bool element_is_value = true;
  static void expand(uint64_t bits, const value* values, Vector* out) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const uint16_t part = static_cast<uint16_t>(bits >> 16 * v);
      out[v] = _mm512_castsi512_ps(expand32(part, values));
      values += __builtin_popcount(part);
    }
  }
  static void dense(const value* values, Vector* out) {
    for (int v = 0; v < 4; ++v) out[v] = _mm512_loadu_ps(values + 16 * v);
  }
  static void widen(const value* values, int n, float* out) {
    _mm512_storeu_ps(out, _mm512_loadu_ps(values));
    for (int i = 16; i < n; i += 16) _mm512_storeu_ps(out + i, _mm512_loadu_ps(values + i));
  }
  static element to_element(value v) { return v; }
  static float to_float(value v) { return v; }
  static value from_float(float x) { return x; }
  static void narrow(const float* sums, int64_t n, value* out) { __builtin_memcpy(out, sums, static_cast<size_t>(n) * 4); }
};

/* 16-bit values as floats; Half::wide() widens 16 of them */
template <class Half>
struct Halves : Floats {
  using value = uint16_t;
  static constexpr bool element_is_value = false;
  static Vector widened(const value* from) { return Half::wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static void expand(uint64_t bits, const value* values, Vector* out) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const uint16_t part = static_cast<uint16_t>(bits >> 16 * v);
      out[v] = Half::wide(expand16_half(part, values));
      values += __builtin_popcount(part);
    }
  }
  static void dense(const value* values, Vector* out) {
    for (int v = 0; v < 4; ++v) out[v] = widened(values + 16 * v);
  }
  static void widen(const value* values, int n, float* out) {
    for (int i = 0; i < n; i += 16) _mm512_storeu_ps(out + i, widened(values + i));
  }
};

struct Fp16 : Halves<Fp16> {
  static Vector wide(__m256i v) { return _mm512_cvtph_ps(v); }
  static element to_element(value v) { return _cvtsh_ss(v); }
  static float to_float(value v) { return _cvtsh_ss(v); }
  static value from_float(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  static void narrow(const float* sums, int64_t n, value* out) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm512_cvtps_ph(_mm512_loadu_ps(sums + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (; i < n; ++i) out[i] = from_float(sums[i]);
  }
};

/* bf16 as floats: for skip, whose inputs do not come in pairs */
struct Bf16Floats : Halves<Bf16Floats> {
  static Vector wide(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static element to_element(value v) { return bf16_to_float(v); }
  static float to_float(value v) { return bf16_to_float(v); }
  static value from_float(float x) { return bf16_from_float(x); }
  static void narrow(const float* sums, int64_t n, value* out) { narrow_bf16(sums, n, out); }
};

/* pairs of bf16, multiplied exactly and added in fp32; the instruction treats subnormals as zeros */
struct Bf16 : Sums {
  using value = uint16_t;
  using element = uint16_t;
  using Vector = __m512i;
  static constexpr int lanes = 32;
  static constexpr bool element_is_value = true;
  static void expand(uint64_t bits, const value* values, Vector* out) {
    const uint32_t low = static_cast<uint32_t>(bits);
    uint32_t high = static_cast<uint32_t>(bits >> 32);
    /* keeps the compiler from shifting in a mask register, which would use the unit that expands */
    asm("" : "+r"(high));
    out[0] = expand16(low, values);
    out[1] = expand16(high, values + __builtin_popcount(low));
  }
  static void dense(const value* values, Vector* out) {
    out[0] = _mm512_loadu_si512(values);
    out[1] = _mm512_loadu_si512(values + 32);
  }
  static Vector load(const element* from) { return _mm512_loadu_si512(from); }
  static void store(element* to, Vector v) { _mm512_storeu_si512(to, v); }
  static Vector splat(const element* from) {
    int pair;
    __builtin_memcpy(&pair, from, 4);
    return _mm512_set1_epi32(pair);
  }
  static Sum madd(Sum sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  static element to_element(value v) { return v; }
  static float to_float(value v) { return bf16_to_float(v); }
  static value from_float(float x) { return bf16_from_float(x); }
  static void narrow(const float* sums, int64_t n, value* out) { narrow_bf16(sums, n, out); }
};

/* For each number of bits: which bytes go to each group of 8 codes, and how far a code lies in them. */
struct Unpacking {
  alignas(64) uint8_t bytes[9][64];
  alignas(64) uint8_t shifts[9][64];
};
constexpr Unpacking make_unpacking() {
  Unpacking u = {};
  for (int bits = 1; bits <= 8; ++bits)
    for (int i = 0; i < 64; ++i) {
      u.bytes[bits][i] = static_cast<uint8_t>(i / 8 * bits + i % 8);
      u.shifts[bits][i] = static_cast<uint8_t>(i % 8 * bits);
    }
  return u;
}
constexpr Unpacking UNPACKING = make_unpacking();

struct Rows {
  alignas(64) uint32_t of[4][16];
};
constexpr Rows make_rows() {
  Rows r = {};
  for (uint32_t row = 0; row < 4; ++row)
    for (int lane = 0; lane < 16; ++lane) r.of[row][lane] = row + (lane < 8 ? 0 : 4);
  return r;
}
constexpr Rows ROWS_OF_SCALES = make_rows();

struct Whole {
  static constexpr bool fours = true;
  using Bytes = __m512i;
  using Ints = __m512i;
  using Sum = __m512;
  using Lane = __m512i;
  static constexpr int lanes = 16, int_columns = 4;
  static constexpr int int_rows(int c) { return c > 2 ? 4 : 8; }
  static float from_half(uint16_t half) { return _cvtsh_ss(half); }
  static uint16_t to_half(float x) { return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)); }
  template <int BITS>
  static constexpr bool signs() {
    return false;
  }
  /* the 8 products of two sums of 4 bits fit 16 bits */
  template <int BITS>
  static constexpr bool merges() {
    return BITS == 4;
  }
  template <int BITS>
  static constexpr bool few() {
    return BITS == 4;
  }
  template <int BITS>
  static constexpr bool ahead() {
    return false;
  }

  template <int BITS>
  struct Codes {
    __m512i bytes, shifts, low;
    Codes(int bits, int)
        : bytes(_mm512_load_si512(UNPACKING.bytes[bits])),
          shifts(_mm512_load_si512(UNPACKING.shifts[bits])),
          low(_mm512_set1_epi8(static_cast<char>((1 << bits) - 1))) {}
    Bytes get(const uint8_t* from) const {
      if (BITS == 4) {
        const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), low);
      }
      const __m512i packed = _mm512_loadu_si512(from);
      if (BITS == 8) return packed;
      return _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(bytes, packed)), low);
    }
    /* in half a register, which takes half the time; of 4 bits */
    Bytes few(const uint8_t* from) const {
      const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      const __m256i codes = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
      return _mm512_zextsi256_si512(_mm256_and_si256(codes, _mm512_castsi512_si256(low)));
    }
  };
  static Bytes load(const int8_t* from) { return _mm512_load_si512(from); }
  static void store(uint8_t* to, Bytes bytes) { _mm512_storeu_si512(to, bytes); }
  static Bytes fill(int low, int high) {
    return _mm512_inserti64x4(_mm512_set1_epi8(static_cast<char>(low)), _mm256_set1_epi8(static_cast<char>(high)), 1);
  }
  /* The bits go from memory to a mask register. Else the compiler would count them there, by way of a general register: two more
     operations of the units that expand and multiply. */
  static Bytes spread(const uint64_t& bits, Bytes codes, Bytes fill) {
    __mmask64 keep;
    asm("kmovq %1, %0" : "=Yk"(keep) : "m"(bits));
    asm("vpexpandb %1, %0%{%2%}" : "+v"(fill) : "v"(codes), "Yk"(keep));
    return fill;
  }
  template <int BITS, bool ZEROS>
  static Bytes spread(const uint64_t& bits, const uint8_t* codes, Bytes fill, int) {
    return spread(bits, _mm512_loadu_si512(codes), fill);
  }
  static Ints none() { return _mm512_setzero_si512(); }
  template <bool SIGNED>
  static Ints dot(Ints ints, Bytes codes, Bytes x) {
    return _mm512_dpbusd_epi32(ints, codes, x);
  }
  struct Scales {
    __m256 of;
    Scales(const uint16_t* low, const uint16_t* high, int32_t half) {
      const __m128i both = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)),
                                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high)));
      of = half ? _mm256_cvtph_ps(both) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(both), 16));
    }
  };
  static Sum zero() { return _mm512_setzero_ps(); }
  using Factors = __m512;
  /* four times the first block's scale, four times the second's: the middle of x's 16 */
  static Factors factors(const Scales& scales, const float* x) {
    return _mm512_castps256_ps512(_mm256_mul_ps(scales.of, _mm256_loadu_ps(x + 4)));
  }
  template <bool SIGNED>
  static Sum madd(Sum sum, Ints ints, Factors factors, int row) {
    const __m512 factor = _mm512_permutexvar_ps(_mm512_load_si512(ROWS_OF_SCALES.of[row]), factors);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), factor, sum);
  }
  static float reduce(Sum sum) { return _mm512_reduce_add_ps(sum); }

  /* As in isa_avx2.cc, two parts side by side. The byte shuffle stays in each 16 bytes, so x comes twice: to either part. */
  template <int BITS>
  struct Pairs {
    __m512i places[2], codes[2];
    static __m512i twice(const void* from) { return _mm512_broadcast_i64x4(_mm256_loadu_si256(static_cast<const __m256i*>(from))); }
    /* the lower half shifted by `low`, the upper by `high` */
    static __m512i shifted(__m512i v, int16_t low, int16_t high) {
      return _mm512_srlv_epi16(v, _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1));
    }
    explicit Pairs(const uint8_t* from) {
      const __m512i packed = twice(from), three = _mm512_set1_epi8(3), low = _mm512_set1_epi8(15);
      const __m512i fours = _mm512_inserti64x4(_mm512_set1_epi32(0x04040000), _mm256_set1_epi32(0x0c0c0808), 1);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        places[h] = _mm512_or_si512(_mm512_and_si512(shifted(packed, 4 * h, 4 * h + 2), three), fours);
        codes[h] = BITS == 8 ? _mm512_loadu_si512(from + 32 + 64 * h)
                             : _mm512_and_si512(shifted(twice(from + 32 + 32 * h), 0, 4), low);
      }
    }
    __m512i dot(const int8_t* x) const {
      __m512i sum = _mm512_setzero_si512(), less = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m512i here = _mm512_shuffle_epi8(twice(x + 32 * h), places[h]);
        /* the unsigned ones are x + 128 and the code of zero, or codes of integers plus 8 */
        if (BITS == 8) {
          const __m512i high = _mm512_set1_epi8(static_cast<char>(0x80));
          sum = _mm512_dpbusd_epi32(sum, _mm512_xor_si512(here, high), codes[h]);
          less = _mm512_dpbusd_epi32(less, high, codes[h]);
        } else {
          sum = _mm512_dpbusd_epi32(sum, codes[h], here);
          less = _mm512_dpbusd_epi32(less, _mm512_set1_epi8(8), here);
        }
      }
      return _mm512_sub_epi32(sum, less);
    }
  };
  using RowSums = __m512;
  static RowSums no_rows() { return _mm512_setzero_ps(); }
  static RowSums madd_pairs(RowSums sums, __m512i ints, const Scales& scales, const float* x) {
    const __m512 factors = _mm512_broadcast_f32x8(_mm256_mul_ps(scales.of, _mm256_loadu_ps(x)));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(ints), factors, sums);
  }
  /* Neighbours are added until 16 lanes have each row twice for either block: 6 instructions, and no conversion, factor and
     multiply-add for each row. */
  static RowSums madd_rows(RowSums sums, const Ints* rows, Factors factors) {
    const __m512i ones = _mm512_set1_epi16(1);
    const auto both = [=](__m512i a, __m512i b) { return _mm512_madd_epi16(_mm512_packs_epi32(a, b), ones); };
    const __m512i all = both(both(rows[0], rows[1]), both(rows[2], rows[3]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), _mm512_shuffle_f32x4(factors, factors, 0x50), sums);
  }
  static void totals(RowSums sums, float* out) {
    const __m256 both = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1)));
  }

  static Lane load_lane(const void* from) { return _mm512_loadu_si512(from); }
  static Lane times(Lane a, int32_t b) { return _mm512_mullo_epi32(a, _mm512_set1_epi32(b)); }
  template <bool SIGNED>
  static Lane splat(const uint8_t* from) {
    int four;
    __builtin_memcpy(&four, from, 4);
    return _mm512_set1_epi32(four);
  }
  template <bool SIGNED>
  static Lane dot4(Lane sum, Lane codes, Lane x) {
    return _mm512_dpbusd_epi32(sum, codes, x);
  }
  static void add_to(float* sums, Lane part, const float* x, float scale) {
    const __m512 scales = _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_set1_ps(scale));
    _mm512_storeu_ps(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(part), scales, _mm512_loadu_ps(sums)));
  }
  static void keep(Lane& sum) { asm volatile("" : "+v"(sum)); }
};
}  // namespace

SECATEURS_INTEGERS(avx512, Whole)
SECATEURS_STREAM(bitmask_bf16_avx512_stream, Bf16)
SECATEURS_STREAM(bitmask_fp16_avx512_stream, Fp16)
SECATEURS_STREAM(bitmask_fp32_avx512_stream, Fp32)
SECATEURS_TILE(bitmask_bf16_avx512_tile, Bf16)
SECATEURS_TILE(bitmask_fp16_avx512_tile, Fp16)
SECATEURS_TILE(bitmask_fp32_avx512_tile, Fp32)
SECATEURS_SKIP(bitmask_bf16_avx512_skip, Bf16Floats)
SECATEURS_SKIP(bitmask_fp16_avx512_skip, Fp16)
SECATEURS_SKIP(bitmask_fp32_avx512_skip, Fp32)
SECATEURS_DENSE(dense_bf16_avx512_stream, Bf16)
SECATEURS_DENSE(dense_fp16_avx512_stream, Fp16)
SECATEURS_DENSE(dense_fp32_avx512_stream, Fp32)
SECATEURS_DENSE_TILE(dense_bf16_avx512_tile, Bf16)
SECATEURS_DENSE_TILE(dense_fp16_avx512_tile, Fp16)
SECATEURS_DENSE_TILE(dense_fp32_avx512_tile, Fp32)
SECATEURS_BLOCK(avx512)
