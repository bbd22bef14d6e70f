/* NEON (AArch64): sums of four floats; survivors are expanded by a loop over bits. Compiled by a cross compiler and tested under
   qemu (csrc/test/neon). */
#include <arm_neon.h>

#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"

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
}  // namespace

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
