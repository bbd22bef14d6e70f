/* NEON (AArch64): sums of four floats; survivors are expanded by a loop over bits. Integers: codes are made signed, so that two
   products fit 16 bits. Compiled by a cross compiler and tested under qemu (csrc/test/neon). */
#include <arm_neon.h>

#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"
#include "integers.h"
#include "block.h"

template <class Value, float (*Widen)(Value), Value (*Narrow)(float), bool Same>
struct Neon {
  static constexpr bool spreads = false, rows_alone = false;
  using value = Value;
  using element = float;
  using Vector = float32x4_t;
  using Sum = float32x4_t;
  static constexpr int lanes = 4, sums = 4;
  static constexpr bool element_is_value = Same;

  static void expand(uint64_t bits, const value* values, Vector* out) {
    float wide[64];
    for (int i = 0; i < 64; ++i) wide[i] = bits >> i & 1 ? Widen(*values++) : 0.0f;
    for (int v = 0; v < 16; ++v) out[v] = vld1q_f32(wide + 4 * v);
  }
  static void dense(const value* values, Vector* out) {
    float wide[64];
    for (int i = 0; i < 64; ++i) wide[i] = Widen(values[i]);
    for (int v = 0; v < 16; ++v) out[v] = vld1q_f32(wide + 4 * v);
  }
  static Vector load(const element* from) { return vld1q_f32(from); }
  static void store(element* to, Vector v) { vst1q_f32(to, v); }
  static Vector splat(const element* from) { return vdupq_n_f32(*from); }
  static Sum madd(Sum sum, Vector a, Vector b) { return vfmaq_f32(sum, a, b); }
  static Sum zero() { return vdupq_n_f32(0); }
  static Sum load_sum(const float* from) { return vld1q_f32(from); }
  static void store_sum(float* to, Sum sum) { vst1q_f32(to, sum); }
  static float reduce(Sum sum) { return vaddvq_f32(sum); }
  static Sum plus(Sum a, Sum b) { return vaddq_f32(a, b); }
  static constexpr int columns = 4;
  static constexpr int rows(int) { return 4; }
  static void keep(Sum& sum) { asm volatile("" : "+w"(sum)); }
  static element to_element(value v) { return Widen(v); }
  static float to_float(value v) { return Widen(v); }
  static value from_float(float x) { return Narrow(x); }
  static void narrow(const float* sums, int64_t n, value* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float(sums[i]);
  }
};

float same(float x) { return x; }
using Bf16 = Neon<uint16_t, bf16_to_float, bf16_from_float, false>;
using Fp16 = Neon<uint16_t, fp16_to_float, fp16_from_float, false>;
using Fp32 = Neon<float, same, same, true>;

struct Whole : Without {
  static constexpr bool fours = true;
  struct Bytes {
    int8x16_t at[4];
  };
  struct Ints {
    int32x4_t at[2];
  };
  using Sum = float32x4_t;
  using Lane = int32x4_t;
  static constexpr int lanes = 4, int_columns = 4;
  static constexpr int int_rows(int) { return 4; }
  static float from_half(uint16_t half) { return fp16_to_float(half); }
  static uint16_t to_half(float x) { return fp16_from_float(x); }
  template <int BITS>
  static constexpr bool signs() {
    return true;
  }
  template <int BITS>
  static constexpr bool ahead() {
    return false;
  }

  template <int BITS>
  struct Codes {
    int bits;
    int8x16_t shift;
    Codes(int bits, int shift) : bits(bits), shift(vdupq_n_s8(static_cast<int8_t>(shift))) {}
    Bytes get(const uint8_t* from) const {
      uint8x16_t codes[4];
      if (BITS == 8) {
        for (int v = 0; v < 4; ++v) codes[v] = vld1q_u8(from + 16 * v);
      } else if (BITS == 4) {
        for (int v = 0; v < 2; ++v) {
          const uint8x16_t both = vld1q_u8(from + 16 * v), low = vandq_u8(both, vdupq_n_u8(15)), high = vshrq_n_u8(both, 4);
          codes[2 * v] = vzip1q_u8(low, high);
          codes[2 * v + 1] = vzip2q_u8(low, high);
        }
      } else {
        uint8_t bytes[64];
        for (int g = 0; g < 8; ++g) {
          /* eight codes of a group take `bits` bytes */
          uint64_t packed;
          __builtin_memcpy(&packed, from + g * bits, 8);
          for (int i = 0; i < 8; ++i) bytes[8 * g + i] = static_cast<uint8_t>(packed >> i * bits & ((1u << bits) - 1));
        }
        for (int v = 0; v < 4; ++v) codes[v] = vld1q_u8(bytes + 16 * v);
      }
      Bytes out;
      for (int v = 0; v < 4; ++v) out.at[v] = vsubq_s8(vreinterpretq_s8_u8(codes[v]), shift);
      return out;
    }
  };
  static Bytes load(const int8_t* from) { return {{vld1q_s8(from), vld1q_s8(from + 16), vld1q_s8(from + 32), vld1q_s8(from + 48)}}; }
  static void store(uint8_t* to, const Bytes& bytes) {
    for (int v = 0; v < 4; ++v) vst1q_u8(to + 16 * v, vreinterpretq_u8_s8(bytes.at[v]));
  }
  static Bytes fill(int low, int high) {
    const int8x16_t first = vdupq_n_s8(static_cast<int8_t>(low)), second = vdupq_n_s8(static_cast<int8_t>(high));
    return {{first, first, second, second}};
  }
  static Bytes spread(uint64_t kept, const Bytes& codes, const Bytes& fill) {
    uint8_t from[64], to[64];
    store(from, codes);
    store(to, fill);
    int n = 0;
    for (; kept; kept &= kept - 1) to[__builtin_ctzll(kept)] = from[n++];
    return load(reinterpret_cast<const int8_t*>(to));
  }
  template <int BITS, bool ZEROS>
  static Bytes spread(uint64_t kept, const uint8_t* codes, const Bytes& fill, int middle) {
    return spread(kept, Codes<BITS>(BITS, middle).get(codes), fill);
  }
  static Ints none() { return {{vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  template <bool SIGNED>
  static Ints dot(Ints ints, const Bytes& codes, const Bytes& x) {
    for (int v = 0; v < 4; ++v) {
      const int16x8_t twos = vmlal_high_s8(vmull_s8(vget_low_s8(codes.at[v]), vget_low_s8(x.at[v])), codes.at[v], x.at[v]);
      ints.at[v / 2] = vpadalq_s16(ints.at[v / 2], twos);
    }
    return ints;
  }
  struct Scales {
    float32x4_t of[2];
    Scales(const uint16_t* low, const uint16_t* high, int32_t half) {
      for (int b = 0; b < 2; ++b) {
        const uint16x4_t bits = vld1_u16(b ? high : low);
        of[b] = half ? vcvt_f32_f16(vreinterpret_f16_u16(bits)) : vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
      }
    }
  };
  static Sum zero() { return vdupq_n_f32(0); }
  struct Factors {
    float of[8];
  };
  static Factors factors(const Scales& scales, const float* x) {
    Factors out;
    for (int b = 0; b < 2; ++b) vst1q_f32(out.of + 4 * b, vmulq_f32(scales.of[b], vld1q_f32(x + 8 * b)));
    return out;
  }
  template <bool SIGNED>
  static Sum madd(Sum sum, const Ints& ints, const Factors& factors, int row) {
    for (int b = 0; b < 2; ++b) sum = vfmaq_n_f32(sum, vcvtq_f32_s32(ints.at[b]), factors.of[4 * b + row]);
    return sum;
  }
  static float reduce(Sum sum) { return vaddvq_f32(sum); }

  /* As in isa_avx2.cc; a block has its 16 lanes in a register. */
  template <int BITS>
  struct Pairs {
    int8x16_t codes[2][4];
    uint8x16_t places[2][4];
    explicit Pairs(const uint8_t* from) {
      for (int b = 0; b < 2; ++b) {
        uint8x16_t packed = vld1q_u8(from + 16 * b);
        for (int k = 0; k < 4; ++k, packed = vshrq_n_u8(packed, 2)) {
          const uint8x16_t fours = vreinterpretq_u8_u32(vdupq_n_u32(k % 2 ? 0x0c0c0808 : 0x04040000));
          places[b][k] = vorrq_u8(vandq_u8(packed, vdupq_n_u8(3)), fours);
          const uint8x16_t stored = vld1q_u8(from + 32 + 32 * (BITS == 8 ? k : k / 2) + 16 * b);
          const uint8x16_t four = k % 2 ? vshrq_n_u8(stored, 4) : vandq_u8(stored, vdupq_n_u8(15));
          codes[b][k] = BITS == 8 ? vreinterpretq_s8_u8(stored) : vsubq_s8(vreinterpretq_s8_u8(four), vdupq_n_s8(8));
        }
      }
    }
    Ints dot(const int8_t* x) const {
      Ints sums;
      for (int b = 0; b < 2; ++b) {
        int32x4_t part[2] = {vdupq_n_s32(0), vdupq_n_s32(0)}; /* twos of rows 0 and 1, of rows 2 and 3 */
        for (int h = 0; h < 2; ++h) {
          const int8x16_t half = vld1q_s8(x + 32 * h + 16 * b);
          const int8x16_t* code = codes[b] + 2 * h;
          const int8x16_t first = vqtbl1q_s8(half, places[b][2 * h]), second = vqtbl1q_s8(half, places[b][2 * h + 1]);
          const int16x8_t low = vmull_s8(vget_low_s8(code[0]), vget_low_s8(first)), high = vmull_high_s8(code[0], first);
          part[0] = vpadalq_s16(part[0], vmlal_s8(low, vget_low_s8(code[1]), vget_low_s8(second)));
          part[1] = vpadalq_s16(part[1], vmlal_high_s8(high, code[1], second));
        }
        sums.at[b] = vpaddq_s32(part[0], part[1]);
      }
      return sums;
    }
  };
  using RowSums = float32x4_t;
  static RowSums no_rows() { return vdupq_n_f32(0); }
  static RowSums madd_pairs(RowSums sums, const Ints& ints, const Scales& scales, const float* x) {
    for (int b = 0; b < 2; ++b) sums = vfmaq_f32(sums, vcvtq_f32_s32(ints.at[b]), vmulq_f32(scales.of[b], vld1q_f32(x + 4 * b)));
    return sums;
  }
  static void totals(RowSums sums, float* out) { vst1q_f32(out, sums); }

  static Lane load_lane(const void* from) { return vld1q_s32(static_cast<const int32_t*>(from)); }
  static Lane times(Lane a, int32_t b) { return vmulq_n_s32(a, b); }
  template <bool SIGNED>
  static int8x16_t splat(const uint8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  template <bool SIGNED>
  static Lane dot4(Lane sum, int8x16_t codes, Lane x) {
    const int8x16_t with = vreinterpretq_s8_s32(x);
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(with)), high = vmull_high_s8(codes, with);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
  static void add_to(float* sums, Lane part, const float* x, float scale) {
    vst1q_f32(sums, vfmaq_f32(vld1q_f32(sums), vcvtq_f32_s32(part), vmulq_n_f32(vld1q_f32(x), scale)));
  }
  static void keep(Lane& sum) { asm volatile("" : "+w"(sum)); }
};
}  // namespace

SECATEURS_INTEGERS(neon, Whole)

SECATEURS_STREAM(bitmask_bf16_neon_stream, Bf16)
SECATEURS_STREAM(bitmask_fp16_neon_stream, Fp16)
SECATEURS_STREAM(bitmask_fp32_neon_stream, Fp32)
SECATEURS_TILE(bitmask_bf16_neon_tile, Bf16)
SECATEURS_TILE(bitmask_fp16_neon_tile, Fp16)
SECATEURS_TILE(bitmask_fp32_neon_tile, Fp32)
SECATEURS_DENSE(dense_bf16_neon_stream, Bf16)
SECATEURS_DENSE(dense_fp16_neon_stream, Fp16)
SECATEURS_DENSE(dense_fp32_neon_stream, Fp32)
SECATEURS_DENSE_TILE(dense_bf16_neon_tile, Bf16)
SECATEURS_DENSE_TILE(dense_fp16_neon_tile, Fp16)
SECATEURS_DENSE_TILE(dense_fp32_neon_tile, Fp32)
SECATEURS_BLOCK(neon)
