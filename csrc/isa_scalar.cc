/* Plain C++: runs on every CPU, and is what other kernels can be compared with. */
#include "kernel.h"

namespace {
#include "number.h"
#include "loops.h"
#include "integers.h"
#include "block.h"

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

struct Whole : Without {
  static constexpr bool fours = false;
  struct Bytes {
    uint8_t at[64];
  };
  struct Ints {
    int32_t at[2];
  };
  using Sum = float;
  using Lane = int32_t;
  static constexpr int lanes = 1, int_columns = 4;
  static constexpr int int_rows(int) { return 4; }
  static float from_half(uint16_t half) { return fp16_to_float(half); }
  static uint16_t to_half(float x) { return fp16_from_float(x); }
  template <int BITS>
  static constexpr bool signs() {
    return false;
  }
  template <int BITS>
  static constexpr bool ahead() {
    return false;
  }

  template <int BITS>
  struct Codes {
    int bits;
    Codes(int bits, int) : bits(bits) {}
    Bytes get(const uint8_t* from) const {
      Bytes out;
      uint64_t waiting = 0;
      int count = 0;
      for (uint8_t& code : out.at) {
        if (count < bits) {
          waiting |= static_cast<uint64_t>(*from++) << count;
          count += 8;
        }
        code = static_cast<uint8_t>(waiting & ((1u << bits) - 1));
        waiting >>= bits;
        count -= bits;
      }
      return out;
    }
  };
  static Bytes load(const int8_t* from) {
    Bytes out;
    __builtin_memcpy(out.at, from, 64);
    return out;
  }
  static void store(uint8_t* to, const Bytes& bytes) { __builtin_memcpy(to, bytes.at, 64); }
  static Bytes fill(int low, int high) {
    Bytes out;
    for (int i = 0; i < 64; ++i) out.at[i] = static_cast<uint8_t>(i < 32 ? low : high);
    return out;
  }
  static Bytes spread(uint64_t bits, const Bytes& codes, Bytes fill) {
    int n = 0;
    for (int i = 0; i < 64; ++i)
      if (bits >> i & 1) fill.at[i] = codes.at[n++];
    return fill;
  }
  template <int BITS, bool ZEROS>
  static Bytes spread(uint64_t bits, const uint8_t* codes, const Bytes& fill, int) {
    return spread(bits, load(reinterpret_cast<const int8_t*>(codes)), fill);
  }
  static Ints none() { return {}; }
  template <bool SIGNED>
  static Ints dot(Ints ints, const Bytes& codes, const Bytes& x) {
    for (int i = 0; i < 64; ++i) ints.at[i / 32] += codes.at[i] * static_cast<int8_t>(x.at[i]);
    return ints;
  }
  struct Scales {
    float of[2][4];
    Scales() = default;
    Scales(const uint16_t* low, const uint16_t* high, int32_t half) {
      for (int r = 0; r < 4; ++r) {
        of[0][r] = half ? fp16_to_float(low[r]) : bf16_to_float(low[r]);
        of[1][r] = half ? fp16_to_float(high[r]) : bf16_to_float(high[r]);
      }
    }
  };
  static Sum zero() { return 0; }
  using Factors = Scales;
  static Factors factors(Scales scales, const float* x) {
    for (int r = 0; r < 8; ++r) scales.of[r / 4][r % 4] *= x[r / 4 * 8];
    return scales;
  }
  template <bool SIGNED>
  static Sum madd(Sum sum, const Ints& ints, const Factors& factors, int row) {
    return sum + static_cast<float>(ints.at[0]) * factors.of[0][row] + static_cast<float>(ints.at[1]) * factors.of[1][row];
  }
  static float reduce(Sum sum) { return sum; }

  template <int BITS>
  struct Pairs {
    const uint8_t* from;
    explicit Pairs(const uint8_t* from) : from(from) {}
    struct Dots {
      int32_t at[2][4];
    };
    Dots dot(const int8_t* x) const {
      Dots sums = {};
      for (int k = 0; k < 4; ++k)
        for (int lane = 0; lane < 32; ++lane) {
          const int b = lane / 16, r = lane / 4 % 4, four = 2 * (k % 2) + lane / 2 % 2;
          const int8_t here = x[k / 2 * 32 + 16 * b + 4 * four + (from[lane] >> 2 * k & 3)];
          const int code = BITS == 8 ? static_cast<int8_t>(from[32 + 32 * k + lane]) : (from[32 + 32 * (k / 2) + lane] >> k % 2 * 4 & 15) - 8;
          sums.at[b][r] += code * here;
        }
      return sums;
    }
  };
  struct RowSums {
    float of[4];
  };
  static RowSums no_rows() { return {}; }
  template <class Dots>
  static RowSums madd_pairs(RowSums sums, const Dots& ints, const Scales& scales, const float* x) {
    for (int i = 0; i < 8; ++i) sums.of[i % 4] += static_cast<float>(ints.at[i / 4][i % 4]) * (scales.of[i / 4][i % 4] * x[i]);
    return sums;
  }
  static void totals(const RowSums& sums, float* out) { __builtin_memcpy(out, sums.of, sizeof(sums.of)); }

  static Lane load_lane(const void* from) {
    Lane out;
    __builtin_memcpy(&out, from, 4);
    return out;
  }
  static Lane times(Lane a, int32_t b) { return a * b; }
  template <bool SIGNED>
  static Lane splat(const uint8_t* from) {
    return load_lane(from);
  }
  template <bool SIGNED>
  static Lane dot4(Lane sum, Lane codes, Lane x) {
    uint8_t code[4];
    int8_t with[4];
    __builtin_memcpy(code, &codes, 4);
    __builtin_memcpy(with, &x, 4);
    for (int i = 0; i < 4; ++i) sum += code[i] * with[i];
    return sum;
  }
  static void add_to(float* sums, Lane part, const float* x, float scale) { *sums += static_cast<float>(part) * (*x * scale); }
  static void keep(Lane& sum) { asm volatile("" : "+m"(sum)); }
};
}  // namespace

SECATEURS_INTEGERS(scalar, Whole)
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
SECATEURS_BLOCK(scalar)
