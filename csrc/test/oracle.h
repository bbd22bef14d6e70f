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
/* what secateurs.h calls it */
inline int32_t dtype_of(const std::string& dtype) {
  return dtype == "bf16" ? SECATEURS_BF16 : dtype == "fp16" ? SECATEURS_FP16 : SECATEURS_FP32;
}
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

/* bits of "int4", 0 of a float */
inline int bits_of(const std::string& stored) { return stored.compare(0, 3, "int") ? 0 : stored[3] - '0'; }
/* the dtype of x: the kernel's own, or any where weights are integers */
inline std::string dtype_for(Random& random, const std::string& stored) {
  const char* all[] = {"bf16", "fp16", "fp32"};
  return bits_of(stored) ? all[random.below(3)] : stored;
}

struct Problem {
  std::string stored, dtype; /* of the weights; of x and y */
  int64_t outputs, inputs;
  std::vector<char> dense;   /* outputs x inputs, of floats */
  std::vector<double> exact; /* the weights as numbers */
  std::vector<uint8_t> codes; /* of integers */
  std::vector<uint64_t> mask;
  std::vector<int64_t> starts;
  int64_t survivors = 0;
  int64_t most = 0; /* survivors of a byte of the mask */
  int bits = 0, group = 0, half = 0;
  int64_t groups = 1;
  bool zeros = false;
  std::unique_ptr<Exact> values, matrix, steps, scale, zero, pairs;
  std::vector<int64_t> step_starts;

  /* density: of survivors at random places; or -n: exactly n of each 4; or TWO: none to two of each 4. symmetric: no group has a zero */
  static constexpr double TWO = -5;
  Problem(Random& random, const std::string& stored, const std::string& dtype, int64_t outputs, int64_t inputs, double density, size_t skew,
          bool symmetric = false)
      : stored(stored), dtype(dtype), outputs(outputs), inputs(inputs), bits(bits_of(stored)) {
    const int64_t panels = (outputs + 3) / 4, words = (inputs + 63) / 64;
    std::vector<bool> kept(static_cast<size_t>(outputs * inputs));
    int64_t of_four = 0;
    for (int64_t i = 0; i < outputs * inputs; ++i) {
      of_four = i % inputs % 4 ? of_four : 0;
      const bool here = density == TWO ? of_four < 2 && random.below(2)
                        : density < 0  ? (i % inputs + i / inputs) % 4 < -density
                                       : random.uniform() < density;
      of_four += here;
      kept[static_cast<size_t>(i)] = here;
    }
    if (bits)
      make_integers(random, kept, symmetric);
    else
      make_floats(random, kept);
    std::string bytes, all; /* of the survivors, and of a dense matrix of integers */
    for (int64_t p = 0; p < panels; ++p) {
      starts.push_back(bits ? static_cast<int64_t>(bytes.size()) : survivors);
      for (int64_t j = 0; j < words; ++j)
        for (int64_t r = p * 4; r < p * 4 + 4; ++r) {
          uint64_t word = 0;
          std::string run, whole; /* a character for each bit */
          for (int64_t i = j * 64; i < j * 64 + 64; ++i) {
            const bool inside = r < outputs && i < inputs;
            const size_t place = static_cast<size_t>(r * inputs + i);
            for (int b = 0; b < bits; ++b) whole += static_cast<char>(inside ? codes[place] >> b & 1 : 0);
            if (!inside || exact[place] == 0) continue;
            word |= uint64_t{1} << (i - j * 64);
            if (!bits) bytes.append(&dense[place * static_cast<size_t>(itemsize(stored))], static_cast<size_t>(itemsize(stored)));
            for (int b = 0; b < bits; ++b) run += static_cast<char>(codes[place] >> b & 1);
            ++survivors;
          }
          mask.push_back(word);
          bytes += bytes_of(run);
          all += bytes_of(whole);
          for (int b = 0; b < 8; ++b) {
            int64_t here = 0;
            for (int i = 0; i < 8; ++i) here += word >> (8 * b + i) & 1;
            most = here > most ? here : most;
          }
        }
    }
    starts.push_back(bits ? static_cast<int64_t>(bytes.size()) : survivors);
    values = std::make_unique<Exact>(bytes.size() + 64, skew);
    memcpy(values->data, bytes.data(), bytes.size());
    matrix = std::make_unique<Exact>(bits ? all.size() + 64 : dense.size(), skew);
    memcpy(matrix->data, bits ? all.data() : dense.data(), bits ? all.size() : dense.size());
    secateurs_weight w = weight(true);
    if (bits) {
      if (symmetric) make_pairs(w, panels * words);
      return;
    }
    step_starts.resize(static_cast<size_t>(panels) + 1);
    steps = steps_of(w, step_starts, itemsize(stored));
  }
  static std::string bytes_of(const std::string& bits) {
    std::string out((bits.size() + 7) / 8, '\0');
    for (size_t i = 0; i < bits.size(); ++i) out[i / 8] = static_cast<char>(out[i / 8] | bits[i] << i % 8);
    return out;
  }
  void make_floats(Random& random, const std::vector<bool>& kept) {
    const size_t size = static_cast<size_t>(itemsize(stored));
    dense.resize(kept.size() * size);
    for (size_t i = 0; i < kept.size(); ++i) {
      if (kept[i]) put(stored, &dense[i * size], static_cast<float>((random.uniform() + 0.5) * (random.below(2) ? 1 : -1)));
      exact.push_back(value_of(stored, &dense[i * size]));
    }
  }
  /* the layout of the strategy `pairs` in a buffer of its size */
  void make_pairs(secateurs_weight& w, int64_t count) {
    pairs = std::make_unique<Exact>(static_cast<size_t>(count * (32 + 16 * bits)));
    memset(pairs->data, 0xff, pairs->nbytes);
    w.pairs = pairs->data;
    secateurs_fill_pairs(&w, 3);
  }
  void make_integers(Random& random, const std::vector<bool>& kept, bool symmetric) {
    const int choices[] = {32, 64, 128, 0};
    group = choices[random.below(4)];
    half = static_cast<int>(random.below(2));
    zeros = !symmetric && random.below(2);
    groups = group ? (inputs + group - 1) / group : 1;
    const int64_t rows = (outputs + 3) / 4 * 4;
    scale = std::make_unique<Exact>(static_cast<size_t>(rows * groups * 2));
    zero = std::make_unique<Exact>(static_cast<size_t>(rows * groups));
    for (int64_t i = 0; i < rows * groups; ++i) {
      put(half ? "fp16" : "bf16", scale->data + 2 * i, static_cast<float>((random.uniform() + 0.5) * (random.below(2) ? 0.01 : -0.01)));
      zero->data[i] = static_cast<char>(zeros ? random.below(1 << bits) : 1 << (bits - 1));
    }
    for (int64_t i = 0; i < outputs * inputs; ++i) {
      const int64_t at = place(i / inputs, i % inputs);
      const uint8_t middle = static_cast<uint8_t>(zero->data[at]);
      codes.push_back(kept[static_cast<size_t>(i)] ? static_cast<uint8_t>(random.below(1 << bits)) : middle);
      exact.push_back(value_of(half ? "fp16" : "bf16", scale->data + 2 * at) * (codes.back() - middle));
    }
  }
  /* of a weight's scale and zero */
  int64_t place(int64_t row, int64_t input) const { return (row / 4 * groups + (group ? input / group : 0)) * 4 + row % 4; }

  secateurs_weight weight(bool packed) const {
    secateurs_weight w = {outputs, inputs, nullptr, matrix->data, nullptr, 0, nullptr, nullptr, bits, group, half, nullptr, nullptr, nullptr};
    if (packed)
      w = {outputs, inputs, mask.data(), values->data, starts.data(), most, steps ? steps->data : nullptr,
           step_starts.empty() ? nullptr : step_starts.data(), bits, group, half, nullptr, nullptr, pairs ? pairs->data : nullptr};
    if (bits) w.scale = reinterpret_cast<const uint16_t*>(scale->data);
    if (zeros) w.zero = reinterpret_cast<const uint8_t*>(zero->data);
    return w;
  }
  /* a token of x as the kernels multiply it: for integers in blocks of 32 that are rounded to absmax / 127 */
  std::vector<double> numbers(const char* x) const {
    std::vector<double> out;
    for (int64_t i = 0; i < inputs; ++i) out.push_back(value_of(dtype, x + i * itemsize(dtype)));
    for (int64_t block = 0; bits && block < inputs; block += 32) {
      const int64_t end = block + 32 < inputs ? block + 32 : inputs;
      float absmax = 0;
      bool finite = true;
      for (int64_t i = block; i < end; ++i) {
        const float here = static_cast<float>(fabs(out[static_cast<size_t>(i)]));
        finite = finite && here <= std::numeric_limits<float>::max();
        absmax = here > absmax ? here : absmax;
      }
      const float step = absmax / 127.0f, inverse = 127.0f / absmax;
      for (int64_t i = block; i < end; ++i) {
        double& here = out[static_cast<size_t>(i)];
        if (!finite)
          here = std::numeric_limits<double>::quiet_NaN();
        else
          here = absmax < 0x1p-100f ? 0 : static_cast<double>(nearbyintf(static_cast<float>(here) * inverse)) * step;
      }
    }
    return out;
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

/* a problem that the kernel takes: any, or for `pairs` one with at most two survivors of four and no zeros of groups */
inline Problem problem_for(Random& random, const secateurs_kernel& row, const std::string& dtype, int64_t outputs, int64_t inputs,
                           double density, size_t skew) {
  const bool pairs = !strcmp(row.strategy, "pairs");
  return Problem(random, row.dtype, dtype, outputs, inputs, pairs && density > 0 ? Problem::TWO : density, skew, pairs);
}

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
  const int32_t code = secateurs_linear(kernel, &product, 1, x, y.data, dtype_of(problem.dtype), tokens, threads);
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
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<double> x_exact = problem.numbers(x + t * problem.inputs * size);
    for (int64_t o = 0; o < problem.outputs; ++o) {
      double want = bias ? value_of(problem.dtype, bias + o * size) : 0, scale = fabs(want);
      for (int64_t i = 0; i < problem.inputs; ++i) {
        const double term = problem.exact[static_cast<size_t>(o * problem.inputs + i)] * x_exact[static_cast<size_t>(i)];
        want += term;
        scale += fabs(term);
      }
      const double got = value_of(problem.dtype, y.data + (t * problem.outputs + o) * size);
      const double bound =
          static_cast<double>(problem.inputs + 4) * 0x1p-23 * scale + rounding(problem.dtype) * (fabs(want) + scale * 0x1p-10) + 1e-7;
      /* written so that NaN fails */
      if (want != want ? got == got : !(fabs(got - want) <= bound))
        if (++bad == 1)
          printf("%s %s: token %ld output %ld is %.9g, not %.9g (bound %.3g)\n", row.name, where.c_str(), static_cast<long>(t),
               static_cast<long>(o), got, want, bound);
    }
  }
  return bad;
}

#endif
