/* What a decoder block does beside its products, for one token: norms, activation, attention over the cache. Written once in the
   compiler's own vectors, which it lowers to each instruction set. Included inside the anonymous namespace of an isa_*.cc, after
   number.h. */

typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideInts __attribute__((vector_size(64)));
typedef uint32_t WideBits __attribute__((vector_size(64)));
typedef uint16_t WideHalves __attribute__((vector_size(32)));
constexpr int64_t WIDE = 16;

template <class To, class From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "bits of another number of bytes");
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

inline Wide all_of(float x) { return x - Wide{}; }

inline float total(Wide v) {
  float lanes[WIDE];
  __builtin_memcpy(lanes, &v, sizeof(v));
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

/* sum + a b, rounded once where there is an instruction for it */
inline Wide madd(Wide sum, Wide a, Wide b) {
#if defined(__AVX512F__)
  return same_bits<Wide>(_mm512_fmadd_ps(same_bits<__m512>(a), same_bits<__m512>(b), same_bits<__m512>(sum)));
#elif defined(__FMA__)
  __m256 x[2], y[2], z[2];
  __builtin_memcpy(x, &a, sizeof(x));
  __builtin_memcpy(y, &b, sizeof(y));
  __builtin_memcpy(z, &sum, sizeof(z));
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  __builtin_memcpy(&sum, z, sizeof(z));
  return sum;
#else
  return sum + a * b;
#endif
}

typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
/* four numbers whose sum is that of all 16 */
inline Quarter quarters(Wide v) {
  Half halves[2];
  __builtin_memcpy(halves, &v, sizeof(v));
  const Half half = halves[0] + halves[1];
  Quarter found[2];
  __builtin_memcpy(found, &half, sizeof(half));
  return found[0] + found[1];
}

inline Wide from_halves(int32_t dtype, WideHalves halves) {
  const WideBits bits = __builtin_convertvector(halves, WideBits);
  if (dtype == SECATEURS_BF16) return same_bits<Wide>(bits << 16);
  /* exponents are 112 apart; a multiplication makes subnormals normal */
  const WideBits magnitude = (bits & 0x7fff) << 13;
  const WideBits finite = same_bits<WideBits>(same_bits<Wide>(magnitude) * 0x1p112f);
  const WideBits found = magnitude < 0x0f800000u ? finite : (magnitude | 0x7f800000u);
  return same_bits<Wide>(found | (bits & 0x8000) << 16);
}

/* 16 numbers from place i on; or the first `some` of them, and zeros */
inline Wide wide_at(int32_t dtype, const void* from, int64_t i) {
  if (dtype == SECATEURS_FP32) {
    Wide v;
    __builtin_memcpy(&v, static_cast<const float*>(from) + i, sizeof(v));
    return v;
  }
  WideHalves halves;
  __builtin_memcpy(&halves, static_cast<const uint16_t*>(from) + i, sizeof(halves));
  return from_halves(dtype, halves);
}
inline Wide some_at(int32_t dtype, const void* from, int64_t i, int64_t some) {
  if (dtype == SECATEURS_FP32) {
    float lanes[WIDE] = {};
    __builtin_memcpy(lanes, static_cast<const float*>(from) + i, static_cast<size_t>(some) * 4);
    return wide_at(dtype, lanes, 0);
  }
  uint16_t lanes[WIDE] = {};
  __builtin_memcpy(lanes, static_cast<const uint16_t*>(from) + i, static_cast<size_t>(some) * 2);
  return wide_at(dtype, lanes, 0);
}
inline void put_wide(float* to, Wide v, int64_t some = WIDE) { __builtin_memcpy(to, &v, static_cast<size_t>(some) * 4); }

/* calls fn(place, count) for each 16 numbers of n; the last ones may be fewer */
template <class Fn>
inline void by_wide(int64_t n, Fn fn) {
  int64_t i = 0;
  for (; i + WIDE <= n; i += WIDE) fn(i, WIDE);
  if (i < n) fn(i, n - i);
}
inline Wide at(const float* from, int64_t i, int64_t some) {
  return some == WIDE ? wide_at(SECATEURS_FP32, from, i) : some_at(SECATEURS_FP32, from, i, some);
}

/* e^x to about 1e-7 of it, by Cephes' polynomial; 0 below -87 is the least normal number here */
inline Wide exponential(Wide x) {
  const Wide low = all_of(-87.0f), high = all_of(88.0f), shift = all_of(12582912.0f);
  Wide y = x < low ? low : x;
  y = y > high ? high : y;
  /* adding 1.5 * 2^23 rounds to an integer, which is then the low bits */
  const Wide shifted = y * 1.44269504f + shift, n = shifted - shift;
  const Wide r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Wide p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Wide found = same_bits<Wide>(same_bits<WideInts>(p) + (same_bits<WideInts>(shifted) << 23));
  return x == x ? found : x;
}

void widen_numbers(int32_t dtype, const void* from, int64_t n, float* to) {
  by_wide(n, [=](int64_t i, int64_t some) {
    put_wide(to + i, some == WIDE ? wide_at(dtype, from, i) : some_at(dtype, from, i, some), some);
  });
}

void narrow_numbers(int32_t dtype, const float* from, int64_t n, void* to) {
  if (dtype == SECATEURS_FP32) {
    __builtin_memcpy(to, from, static_cast<size_t>(n) * 4);
    return;
  }
  uint16_t* halves = static_cast<uint16_t*>(to);
  if (dtype == SECATEURS_BF16)
    for (int64_t i = 0; i < n; ++i) halves[i] = bf16_from_float(from[i]);
  else
    for (int64_t i = 0; i < n; ++i) halves[i] = fp16_from_float(from[i]);
}

void norm(const float* x, const float* weight, int64_t n, float eps, float* out) {
  Wide squares = {};
  by_wide(n, [&](int64_t i, int64_t some) {
    const Wide v = at(x, i, some);
    squares += v * v;
  });
  const float by = 1 / __builtin_sqrtf(total(squares) / static_cast<float>(n) + eps);
  by_wide(n, [=](int64_t i, int64_t some) { put_wide(out + i, at(x, i, some) * by * at(weight, i, some), some); });
}

void gate(int32_t activation, float* gate, const float* up, int64_t n) {
  by_wide(n, [=](int64_t i, int64_t some) {
    const Wide x = at(gate, i, some);
    /* both are x sigmoid(z); tanh(a) = 2 sigmoid(2 a) - 1 */
    const Wide z = activation == SECATEURS_SILU ? x : (x + x * x * x * 0.044715f) * 1.5957691216f;
    put_wide(gate + i, x / (exponential(-z) + 1.0f) * at(up, i, some), some);
  });
}

/* queries filled up to whole registers, then for each of them a row of scores, and one of quarters of them */
int64_t stride_of(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }
int64_t scores_of(const Attention& a) { return least(a.count, 4) * (stride_of(a.dim) + 5 * stride_of(a.tokens)); }

template <int QUERIES, int32_t DTYPE>
void attend_some(const Attention& a, int64_t first, float* scratch) {
  const int64_t dims = stride_of(a.dim), row = stride_of(a.tokens), whole = a.dim / WIDE * WIDE, left = a.dim - whole;
  constexpr int64_t SIZE = DTYPE == SECATEURS_FP32 ? 4 : 2;
  float *queries = scratch, *scores = queries + QUERIES * dims, *fours = scores + QUERIES * row;
  for (int q = 0; q < QUERIES; ++q)
    by_wide(a.dim, [&](int64_t i, int64_t some) { put_wide(queries + q * dims + i, at(a.queries + (first + q) * a.dim, i, some) * a.scaling); });
  for (int64_t t = 0; t < a.tokens; ++t) {
    const char* key = static_cast<const char*>(a.keys) + t * a.dim * SIZE;
    Wide sum[QUERIES] = {};
    for (int64_t i = 0; i < whole; i += WIDE) {
      const Wide part = wide_at(DTYPE, key, i);
      for (int q = 0; q < QUERIES; ++q) sum[q] = madd(sum[q], part, wide_at(SECATEURS_FP32, queries + q * dims, i));
    }
    if (left) {
      const Wide part = some_at(DTYPE, key, whole, left);
      for (int q = 0; q < QUERIES; ++q) sum[q] = madd(sum[q], part, wide_at(SECATEURS_FP32, queries + q * dims, whole));
    }
    for (int q = 0; q < QUERIES; ++q) {
      const Quarter found = quarters(sum[q]);
      __builtin_memcpy(fours + 4 * (q * row + t), &found, sizeof(found));
    }
  }
  float by[QUERIES];
  for (int q = 0; q < QUERIES; ++q) {
    float* of = scores + q * row;
    const float* four = fours + 4 * q * row;
    for (int64_t t = 0; t < a.tokens; ++t) of[t] = (four[4 * t] + four[4 * t + 1]) + (four[4 * t + 2] + four[4 * t + 3]);
    float most = of[0];
    for (int64_t t = 1; t < a.tokens; ++t) most = of[t] > most ? of[t] : most;
    Wide sum = {};
    by_wide(a.tokens, [&](int64_t i, int64_t some) {
      put_wide(of + i, exponential(at(of, i, some) - most), some);
      sum += at(of, i, some);
    });
    by[q] = 1 / total(sum);
  }
  by_wide(a.dim, [&](int64_t i, int64_t some) {
    Wide sum[QUERIES] = {};
    const char* value = static_cast<const char*>(a.values);
    for (int64_t t = 0; t < a.tokens; ++t, value += a.dim * SIZE) {
      const Wide part = some == WIDE ? wide_at(DTYPE, value, i) : some_at(DTYPE, value, i, some);
      for (int q = 0; q < QUERIES; ++q) sum[q] = madd(sum[q], part, all_of(scores[q * row + t]));
    }
    for (int q = 0; q < QUERIES; ++q) put_wide(a.out + (first + q) * a.dim + i, sum[q] * by[q], some);
  });
}

template <int32_t DTYPE>
void attend_all(const Attention& a, float* scratch) {
  int64_t q = 0;
  for (; q + 4 <= a.count; q += 4) attend_some<4, DTYPE>(a, q, scratch);
  for (; q + 2 <= a.count; q += 2) attend_some<2, DTYPE>(a, q, scratch);
  for (; q < a.count; ++q) attend_some<1, DTYPE>(a, q, scratch);
}

void attend(const Attention& a, float* scratch) {
  if (a.dtype == SECATEURS_BF16)
    attend_all<SECATEURS_BF16>(a, scratch);
  else if (a.dtype == SECATEURS_FP16)
    attend_all<SECATEURS_FP16>(a, scratch);
  else
    attend_all<SECATEURS_FP32>(a, scratch);
}

#define SECATEURS_BLOCK(isa) const BlockBody block_##isa = {widen_numbers, narrow_numbers, norm, gate, scores_of, attend};
