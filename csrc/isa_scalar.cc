/* Plain C++: runs on every CPU, and is what other kernels can be compared with. */
#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"

template <class Value, float (*Widen)(Value), Value (*Narrow)(float)>
struct Scalar {
  static constexpr bool spreads = false, rows_alone = false;
  using value = Value;
  using element = float;
  using Vector = float;
  using Sum = float;
  static constexpr int lanes = 1, sums = 1;
  static constexpr bool element_is_value = false;

  static void expand(uint64_t bits, const value* values, Vector* out) {
    for (int i = 0; i < 64; ++i) out[i] = bits >> i & 1 ? Widen(*values++) : 0.0f;
  }
  static void dense(const value* values, Vector* out) {
    for (int i = 0; i < 64; ++i) out[i] = Widen(values[i]);
  }
  static Vector load(const element* from) { return *from; }
  static void store(element* to, Vector v) { *to = v; }
  static Vector splat(const element* from) { return *from; }
  static Sum madd(Sum sum, Vector a, Vector b) { return sum + a * b; }
  static Sum zero() { return 0; }
  static Sum load_sum(const float* from) { return *from; }
  static void store_sum(float* to, Sum sum) { *to = sum; }
  static float reduce(Sum sum) { return sum; }
  static Sum plus(Sum a, Sum b) { return a + b; }
  static constexpr int columns = 4;
  static constexpr int rows(int) { return 4; }
  static void keep(Sum& sum) { asm volatile("" : "+m"(sum)); }
  static element to_element(value v) { return Widen(v); }
  static float to_float(value v) { return Widen(v); }
  static value from_float(float x) { return Narrow(x); }
  static void narrow(const float* sums, int64_t n, value* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = from_float(sums[i]);
  }
};

float same(float x) { return x; }
using Bf16 = Scalar<uint16_t, bf16_to_float, bf16_from_float>;
using Fp16 = Scalar<uint16_t, fp16_to_float, fp16_from_float>;
using Fp32 = Scalar<float, same, same>;
}  // namespace

SECATEURS_STREAM(bitmask_bf16_scalar_stream, Bf16)
SECATEURS_STREAM(bitmask_fp16_scalar_stream, Fp16)
SECATEURS_STREAM(bitmask_fp32_scalar_stream, Fp32)
SECATEURS_TILE(bitmask_bf16_scalar_tile, Bf16)
SECATEURS_TILE(bitmask_fp16_scalar_tile, Fp16)
SECATEURS_TILE(bitmask_fp32_scalar_tile, Fp32)
SECATEURS_DENSE(dense_bf16_scalar_stream, Bf16)
SECATEURS_DENSE(dense_fp16_scalar_stream, Fp16)
SECATEURS_DENSE(dense_fp32_scalar_stream, Fp32)
SECATEURS_DENSE_TILE(dense_bf16_scalar_tile, Bf16)
SECATEURS_DENSE_TILE(dense_fp16_scalar_tile, Fp16)
SECATEURS_DENSE_TILE(dense_fp32_scalar_tile, Fp32)
