/* What the tests share: random problems, packing by a plain loop, and the product as a double loop in double precision. */
#ifndef SECATEURS_ORACLE_H
#define SECATEURS_ORACLE_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "secateurs.h"

namespace {
#include "number.h"
}

struct Random {
  uint64_t state;
  uint64_t bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state * 0x2545f4914f6cdd1dULL;
  }
  double uniform() { return static_cast<double>(bits() >> 11) / 9007199254740992.0; }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() >> 33) % n; }
};

/* one element of dtype "bf16", "fp16" or "fp32" */
inline int itemsize(const std::string& dtype) { return dtype == "fp32" ? 4 : 2; }
inline double value_of(const std::string& dtype, const char* at) {
  if (dtype == "fp32") {
    float x;
    memcpy(&x, at, 4);
    return x;
  }
  uint16_t x;
  memcpy(&x, at, 2);
  return dtype == "bf16" ? bf16_to_float(x) : fp16_to_float(x);
}
inline void put(const std::string& dtype, char* at, float x) {
  const uint16_t half = dtype == "bf16" ? bf16_from_float(x) : fp16_from_float(x);
  if (dtype == "fp32")
    memcpy(at, &x, 4);
  else
    memcpy(at, &half, 2);
}
/* half the distance to the next number, relative */
inline double rounding(const std::string& dtype) { return dtype == "bf16" ? 0x1p-8 : dtype == "fp16" ? 0x1p-11 : 0; }

/* A buffer of exactly so many bytes, so that a sanitizer sees the first one beyond; misaligned by `skew` bytes. */
struct Exact {
  std::unique_ptr<char[]> owner;
  char* data;
  size_t nbytes;
  Exact(size_t n, size_t skew = 0) : owner(new char[n + skew]), data(owner.get() + skew), nbytes(n) { memset(data, 0, n); }
};

struct Problem {
  std::string dtype;
  int64_t outputs, inputs;
  std::vector<char> dense;   /* outputs x inputs */
  std::vector<double> exact; /* the same as numbers */
  std::vector<uint64_t> mask;
  std::vector<int64_t> starts;
  int64_t survivors = 0;
  int64_t most = 0; /* survivors of a byte of the mask */
  std::unique_ptr<Exact> values, matrix, steps;
  std::vector<int64_t> step_starts;

  /* density: of survivors at random places; or -n: exactly n of each 4 */
  Problem(Random& random, const std::string& dtype, int64_t outputs, int64_t inputs, double density, size_t skew)
      : dtype(dtype), outputs(outputs), inputs(inputs), dense(static_cast<size_t>(outputs * inputs * itemsize(dtype))) {
    for (int64_t i = 0; i < outputs * inputs; ++i)
      if (density < 0 ? (i % inputs + i / inputs) % 4 < -density : random.uniform() < density)
        put(dtype, &dense[static_cast<size_t>(i * itemsize(dtype))], static_cast<float>((random.uniform() + 0.5) * (random.below(2) ? 1 : -1)));
    for (int64_t i = 0; i < outputs * inputs; ++i) exact.push_back(value_of(dtype, &dense[static_cast<size_t>(i * itemsize(dtype))]));
    const int64_t panels = (outputs + 3) / 4, words = (inputs + 63) / 64;
    std::vector<char> kept;
    for (int64_t p = 0; p < panels; ++p) {
      starts.push_back(survivors);
      for (int64_t j = 0; j < words; ++j)
        for (int64_t r = p * 4; r < p * 4 + 4; ++r) {
          uint64_t bits = 0;
          for (int64_t i = j * 64; i < j * 64 + 64; ++i) {
            if (r >= outputs || i >= inputs) continue;
            const char* at = &dense[static_cast<size_t>((r * inputs + i) * itemsize(dtype))];
            if (value_of(dtype, at) == 0) continue;
            bits |= uint64_t{1} << (i - j * 64);
            kept.insert(kept.end(), at, at + itemsize(dtype));
            ++survivors;
          }
          mask.push_back(bits);
          for (int b = 0; b < 8; ++b) {
            int64_t here = 0;
            for (int i = 0; i < 8; ++i) here += bits >> (8 * b + i) & 1;
            most = here > most ? here : most;
          }
        }
    }
    starts.push_back(survivors);
    values = std::make_unique<Exact>(kept.size() + 64, skew);
    if (!kept.empty()) memcpy(values->data, kept.data(), kept.size());
    matrix = std::make_unique<Exact>(dense.size(), skew);
    memcpy(matrix->data, dense.data(), dense.size());
    secateurs_weight w = weight(true);
    step_starts.resize(static_cast<size_t>(panels) + 1);
    steps = steps_of(w, step_starts, itemsize(dtype));
  }
  secateurs_weight weight(bool packed) const {
    if (packed) return {outputs, inputs, mask.data(), values->data, starts.data(), most, steps ? steps->data : nullptr, step_starts.data()};
    return {outputs, inputs, nullptr, matrix->data, nullptr, 0, nullptr, nullptr};
  }
  /* the layout of the strategy `gather` in a buffer of its size */
  static std::unique_ptr<Exact> steps_of(secateurs_weight& w, std::vector<int64_t>& starts, int size) {
    const int64_t count = secateurs_count_steps(&w, starts.data());
    auto made = std::make_unique<Exact>(static_cast<size_t>(count * 8 * (1 + size)));
    memset(made->data, 0xff, made->nbytes);
    w.steps = made->data;
    w.step_starts = starts.data();
    secateurs_fill_steps(&w, size, 2);
    return made;
  }
};

/* Runs a kernel on x and compares with the double loop. The bound: any order of n additions in fp32 is off by at most
   n * eps * sum |terms| (Higham 2002, section 4.2), then one rounding to the dtype. Returns the number of bad values. */
inline int check(int32_t kernel, const secateurs_kernel& row, const Problem& problem, const char* x, const char* bias,
                 int64_t tokens, int32_t threads, const std::string& where) {
  const int size = itemsize(problem.dtype);
  const int64_t count = tokens * problem.outputs;
  constexpr int canary = 64;
  Exact y(static_cast<size_t>(count * size + canary));
  memset(y.data, 0xff, y.nbytes); /* NaN in all three dtypes */
  const secateurs_product product = {problem.weight(!strcmp(row.format, "bitmask")), bias};
  const int32_t code = secateurs_linear(kernel, &product, 1, x, y.data, tokens, threads);
  int bad = 0;
  if (code != SECATEURS_OK) {
    printf("%s %s: code %d\n", row.name, where.c_str(), code);
    return 1;
  }
  for (int c = 0; c < canary; ++c)
    if (static_cast<unsigned char>(y.data[count * size + c]) != 0xff) {
      printf("%s %s: wrote %d bytes past the end\n", row.name, where.c_str(), c + 1);
      return 1;
    }
  std::vector<double> x_exact;
  for (int64_t i = 0; i < tokens * problem.inputs; ++i) x_exact.push_back(value_of(problem.dtype, x + i * size));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t o = 0; o < problem.outputs; ++o) {
      double want = bias ? value_of(problem.dtype, bias + o * size) : 0, scale = fabs(want);
      for (int64_t i = 0; i < problem.inputs; ++i) {
        const double term = problem.exact[static_cast<size_t>(o * problem.inputs + i)] * x_exact[static_cast<size_t>(t * problem.inputs + i)];
        want += term;
        scale += fabs(term);
      }
      const double got = value_of(problem.dtype, y.data + (t * problem.outputs + o) * size);
      const double bound =
          static_cast<double>(problem.inputs + 4) * 0x1p-23 * scale + rounding(problem.dtype) * (fabs(want) + scale * 0x1p-10) + 1e-7;
      /* written so that NaN fails */
      if (!(fabs(got - want) <= bound) && ++bad == 1)
        printf("%s %s: token %ld output %ld is %.9g, not %.9g (bound %.3g)\n", row.name, where.c_str(), static_cast<long>(t),
               static_cast<long>(o), got, want, bound);
    }
  return bad;
}

#endif
