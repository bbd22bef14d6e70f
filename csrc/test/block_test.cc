/* A decoder block for one token against the same in double precision, on every instruction set that this CPU runs. */
#include <algorithm>
#include <thread>

#include "oracle.h"

namespace {
int failures = 0, runs = 0;

int32_t threads_of_test(int64_t begin, int64_t end, int64_t, secateurs_range fn, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back([=] { fn(i, i + 1, context); });
  for (std::thread& t : threads) t.join();
  return 0;
}

using Numbers = std::vector<double>;

struct Shape {
  int64_t width, heads, kv_heads, dim, inner, rotated, tokens;
};

/* what a matrix makes of x, rounded before and after as the kernel does */
Numbers times(const Problem& problem, const Numbers& x, const Numbers& bias) {
  const size_t size = static_cast<size_t>(itemsize(problem.dtype));
  Exact given(x.size() * size);
  for (size_t i = 0; i < x.size(); ++i) put(problem.dtype, given.data + i * size, static_cast<float>(x[i]));
  const Numbers numbers = problem.numbers(given.data);
  Numbers y;
  for (int64_t o = 0; o < problem.outputs; ++o) {
    double sum = bias[static_cast<size_t>(o)];
    for (int64_t i = 0; i < problem.inputs; ++i) sum += problem.exact[static_cast<size_t>(o * problem.inputs + i)] * numbers[static_cast<size_t>(i)];
    y.push_back(sum);
  }
  return y;
}

void normalize(double* x, const double* weight, int64_t n, double eps) {
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const double by = 1 / sqrt(squares / static_cast<double>(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] *= by * weight[i];
}

double activated(int32_t activation, double x) {
  if (activation == SECATEURS_SILU) return x / (1 + exp(-x));
  return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

Numbers read(const std::string& dtype, const Exact& from) {
  Numbers out;
  const size_t size = static_cast<size_t>(itemsize(dtype));
  for (size_t i = 0; i < from.nbytes / size; ++i) out.push_back(value_of(dtype, from.data + i * size));
  return out;
}

void random_numbers(Random& random, const std::string& dtype, Exact& to) {
  const size_t size = static_cast<size_t>(itemsize(dtype));
  for (size_t i = 0; i < to.nbytes / size; ++i) put(dtype, to.data + i * size, static_cast<float>(random.uniform() * 2 - 1));
}

/* before: norms before attention and MLP. after: norms after them. together: norms of all heads at once. apart: every matrix a call of
   its own. merged: q, k and v are one matrix, gate and up another. alone: attention without the rest. */
struct Form {
  const char* name;
  bool before, after, of_heads, together, apart, merged, alone;
};

constexpr Form FORMS[] = {
    {"Llama", true, false, false, false, false, false, false},
    {"Qwen 3", true, false, true, false, false, false, false},
    {"apart", true, false, false, false, true, false, false},
    {"Gemma 3", true, true, true, false, false, false, false},
    {"OLMo 2", false, true, true, true, true, false, false},
    {"Phi 3", true, false, false, false, false, true, false},
    {"attention alone", false, false, true, false, false, false, true},
    {"attention alone, norms together, merged", false, false, true, true, false, true, true},
};

void one(Random& random, int32_t kernel, const secateurs_kernel& row, const Shape& s, const Form& form, int32_t activation) {
  const std::string dtype = dtype_for(random, row.dtype), of_products = bits_of(row.dtype) ? "fp32" : dtype;
  const size_t size = static_cast<size_t>(itemsize(dtype));
  const int64_t q = s.heads * s.dim, kv = s.kv_heads * s.dim;
  std::vector<std::pair<int64_t, int64_t>> shapes = {{q, s.width}, {kv, s.width}, {kv, s.width}, {s.width, q}, {s.inner, s.width}, {s.inner, s.width}, {s.width, s.inner}};
  if (form.merged) shapes = {{q + 2 * kv, s.width}, {s.width, q}, {2 * s.inner, s.width}, {s.width, s.inner}};
  const size_t out_at = form.merged ? 1 : 3, down_at = shapes.size() - 1;
  std::vector<Problem> matrices;
  for (const auto& shape : shapes) matrices.emplace_back(random, row.dtype, of_products, shape.first, shape.second, 1.0, 0);
  std::vector<secateurs_product> products;
  for (const Problem& matrix : matrices) products.push_back({matrix.weight(false), nullptr});
  /* every other matrix has a bias */
  std::vector<Exact> of_biases;
  std::vector<const void*> biases;
  std::vector<Numbers> added;
  for (size_t i = 0; i < shapes.size(); ++i) {
    of_biases.emplace_back(static_cast<size_t>(shapes[i].first) * size);
    if (i % 2) random_numbers(random, dtype, of_biases.back());
    biases.push_back(i % 2 ? of_biases.back().data : nullptr);
    added.push_back(read(dtype, of_biases.back()));
  }
  const int32_t code = dtype_of(of_products);
  const auto call = [&](size_t first, int32_t count) {
    int64_t outputs = 0;
    for (size_t i = first; i < first + static_cast<size_t>(count); ++i) outputs += shapes[i].first;
    return secateurs_call{&products[first], &biases[first], count, kernel, code, outputs};
  };
  /* factors that keep scores of attention and the MLP's numbers near 1 */
  const int64_t lengths[6] = {s.width, s.width, form.together ? q : s.dim, form.together ? kv : s.dim, s.width, s.width};
  const bool there[6] = {form.before, form.before, form.of_heads, form.of_heads, form.after, form.after};
  Numbers norms[6];
  std::vector<Exact> weights;
  const float plus = random.below(2) ? 0.125f : 0;
  for (int n = 0; n < 6; ++n) {
    weights.emplace_back(static_cast<size_t>(lengths[n]) * size);
    for (int64_t i = 0; i < lengths[n]; ++i)
      put(dtype, weights.back().data + static_cast<size_t>(i) * size, static_cast<float>((0.5 + random.uniform()) / (n < 2 ? sqrt(static_cast<double>(s.width)) : 1)) - plus);
    norms[n] = read(dtype, weights.back());
    for (double& factor : norms[n]) factor += plus;
  }
  const auto weights_of = [&](size_t n) -> const void* { return there[n] ? weights[n].data : nullptr; };
  const auto normed = [&](int n, double* from, double eps) {
    if (there[n]) normalize(from, norms[n].data(), lengths[n], eps);
  };
  secateurs_block b = {};
  b.dtype = dtype_of(dtype), b.activation = activation;
  b.width = s.width, b.heads = s.heads, b.kv_heads = s.kv_heads, b.dim = s.dim, b.inner = s.inner;
  b.scaling = 0.3f, b.residual = 0.7f, b.eps = 1e-2f, b.eps_of_heads = 1e-3f, b.plus = plus, b.heads_together = form.together;
  b.attention_norm = weights_of(0), b.mlp_norm = weights_of(1), b.q_norm = weights_of(2), b.k_norm = weights_of(3);
  b.attention_out_norm = weights_of(4), b.mlp_out_norm = weights_of(5);
  b.out = call(out_at, 1);
  if (!form.alone) b.down = call(down_at, 1);
  const int32_t of_qkv = form.merged ? 1 : 3, of_gate_up = form.merged ? 1 : 2;
  for (int32_t i = 0; i < of_qkv; ++i)
    if (form.apart || !i) b.qkv[i] = call(static_cast<size_t>(i), form.apart ? 1 : of_qkv);
  for (int32_t i = 0; i < of_gate_up; ++i)
    if (form.apart || !i) b.gate_up[i] = call(out_at + 1 + static_cast<size_t>(i), form.apart ? 1 : of_gate_up);

  const std::string of_turns = random.below(2) ? "fp32" : dtype;
  const int64_t room = s.tokens + 1 + random.below(3);
  Exact x(static_cast<size_t>(s.width) * size), y(x.nbytes), cos(static_cast<size_t>(s.rotated * itemsize(of_turns))), sin(cos.nbytes);
  Exact keys(static_cast<size_t>(kv * room) * size), values(keys.nbytes);
  random_numbers(random, dtype, x);
  random_numbers(random, of_turns, cos);
  random_numbers(random, of_turns, sin);
  random_numbers(random, dtype, keys);
  random_numbers(random, dtype, values);
  /* what is not yet there is NaN */
  for (Exact* cache : {&keys, &values})
    for (int64_t head = 0; head < s.kv_heads; ++head)
      memset(cache->data + static_cast<size_t>((head * room + s.tokens) * s.dim) * size, 0xff, static_cast<size_t>((room - s.tokens) * s.dim) * size);
  Numbers key_numbers = read(dtype, keys), value_numbers = read(dtype, values);

  std::vector<Exact> caches, outs;
  int32_t wrong = 0;
  for (int32_t threads : {1, 3}) {
    Exact mine(keys.nbytes), others(keys.nbytes);
    memcpy(mine.data, keys.data, keys.nbytes);
    memcpy(others.data, values.data, keys.nbytes);
    Exact made(y.nbytes);
    memset(made.data, 0xff, made.nbytes);
    wrong |= secateurs_decode(&b, x.data, made.data, cos.data, sin.data, dtype_of(of_turns), s.rotated, mine.data, others.data, room, s.tokens, threads);
    caches.push_back(std::move(mine));
    caches.push_back(std::move(others));
    outs.push_back(std::move(made));
  }

  /* the same in double precision */
  const Numbers cosines = read(of_turns, cos), sines = read(of_turns, sin);
  /* what several matrices make of x, one after the other */
  const auto made_of = [&](size_t first, size_t last, const Numbers& from) {
    Numbers all;
    for (size_t i = first; i < last; ++i) {
      const Numbers part = times(matrices[i], from, added[i]);
      all.insert(all.end(), part.begin(), part.end());
    }
    return all;
  };
  Numbers h = read(dtype, x), n = h;
  normed(0, n.data(), b.eps);
  const Numbers qkv = made_of(0, out_at, n);
  Numbers qs(qkv.begin(), qkv.begin() + q), ks(qkv.begin() + q, qkv.begin() + q + kv);
  const Numbers vs(qkv.begin() + q + kv, qkv.end());
  if (form.together) {
    normed(2, qs.data(), b.eps_of_heads);
    normed(3, ks.data(), b.eps_of_heads);
  }
  for (int64_t head = 0; head < s.heads + s.kv_heads; ++head) {
    double* at = head < s.heads ? &qs[static_cast<size_t>(head * s.dim)] : &ks[static_cast<size_t>((head - s.heads) * s.dim)];
    if (!form.together) normed(head < s.heads ? 2 : 3, at, b.eps_of_heads);
    const Numbers before(at, at + s.dim);
    const int64_t half = s.rotated / 2;
    for (int64_t i = 0; i < s.rotated; ++i) {
      const double other = i < half ? -before[static_cast<size_t>(i + half)] : before[static_cast<size_t>(i - half)];
      at[i] = before[static_cast<size_t>(i)] * cosines[static_cast<size_t>(i)] + other * sines[static_cast<size_t>(i)];
    }
  }
  const auto place = [&](int64_t head, int64_t token, int64_t i) { return static_cast<size_t>((head * room + token) * s.dim + i); };
  for (int64_t head = 0; head < s.kv_heads; ++head)
    for (int64_t i = 0; i < s.dim; ++i) {
      key_numbers[place(head, s.tokens, i)] = ks[static_cast<size_t>(head * s.dim + i)];
      value_numbers[place(head, s.tokens, i)] = vs[static_cast<size_t>(head * s.dim + i)];
    }
  Numbers attended;
  for (int64_t head = 0; head < s.heads; ++head) {
    const int64_t of = head / (s.heads / s.kv_heads);
    Numbers weights, sum(static_cast<size_t>(s.dim));
    double all = 0;
    for (int64_t t = 0; t <= s.tokens; ++t) {
      double score = 0;
      for (int64_t i = 0; i < s.dim; ++i) score += qs[static_cast<size_t>(head * s.dim + i)] * key_numbers[place(of, t, i)];
      weights.push_back(exp(score * b.scaling));
      all += weights.back();
    }
    for (int64_t t = 0; t <= s.tokens; ++t)
      for (int64_t i = 0; i < s.dim; ++i) sum[static_cast<size_t>(i)] += weights[static_cast<size_t>(t)] / all * value_numbers[place(of, t, i)];
    attended.insert(attended.end(), sum.begin(), sum.end());
  }
  Numbers out = times(matrices[out_at], attended, added[out_at]), down(h.size());
  if (form.alone) {
    h = out;
  } else {
    normed(4, out.data(), b.eps);
    for (size_t i = 0; i < h.size(); ++i) h[i] += b.residual * out[i];
    n = h;
    normed(1, n.data(), b.eps);
    const Numbers gate_up = made_of(out_at + 1, down_at, n);
    Numbers gates(gate_up.begin(), gate_up.begin() + s.inner);
    for (size_t i = 0; i < gates.size(); ++i) gates[i] = activated(activation, gates[i]) * gate_up[static_cast<size_t>(s.inner) + i];
    down = times(matrices[down_at], gates, added[down_at]);
    normed(5, down.data(), b.eps);
    for (size_t i = 0; i < h.size(); ++i) h[i] += b.residual * down[i];
  }
  double summed = 0;
  for (size_t i = 0; i < h.size(); ++i) summed = std::max({summed, fabs(h[i]), fabs(out[i]), fabs(down[i])});

  /* numbers are rounded to the dtype a few times, and where x is rounded to 8 bits one may round to the other side */
  const double step = bits_of(row.dtype) ? 4e-2 : 1e-5 + 4 * rounding(dtype);
  const auto near = [&](const Numbers& wanted, const Exact& found, double most, const char* what) {
    const Numbers got = read(dtype, found);
    for (double w : wanted) most = w == w ? std::max(most, fabs(w)) : most;
    int bad = 0;
    for (size_t i = 0; i < got.size(); ++i)
      if (wanted[i] != wanted[i] ? got[i] == got[i] : !(fabs(got[i] - wanted[i]) <= (step + rounding(dtype)) * most)) ++bad;
    ++runs;
    if (!bad) return;
    ++failures;
    printf("%s, %s, %ldx%ld inputs, %ld of %ld heads of %ld, %ld tokens, %s: %d of %zu %s are wrong\n", row.name, form.name, static_cast<long>(s.width),
           static_cast<long>(s.inner), static_cast<long>(s.kv_heads), static_cast<long>(s.heads), static_cast<long>(s.dim),
           static_cast<long>(s.tokens), dtype.c_str(), bad, got.size(), what);
  };
  near(h, outs[0], summed, "outputs");
  near(key_numbers, caches[0], 0, "keys");
  near(value_numbers, caches[1], 0, "values");
  ++runs;
  if (wrong || memcmp(outs[0].data, outs[1].data, y.nbytes) || memcmp(caches[0].data, caches[2].data, keys.nbytes) ||
      memcmp(caches[1].data, caches[3].data, keys.nbytes)) {
    ++failures;
    printf("%s, %s: code %d, or three threads give other bits than one\n", row.name, form.name, wrong);
  }
}

/* zeros as weights leave h as it is, whatever the cache holds; and a large score takes all: a value by hand */
void by_hand(int32_t kernel) {
  const float identity[16] = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, none[16] = {}, ones[4] = {1, 1, 1, 1};
  const auto product = [](const float* matrix) {
    return secateurs_product{{4, 4, nullptr, matrix, nullptr, 0, nullptr, nullptr, 0, 0, 0, nullptr, nullptr, nullptr}, nullptr};
  };
  const void* const no_biases[3] = {};
  const secateurs_product qkv[] = {product(identity), product(none), product(none)}, out[] = {product(identity)};
  const secateurs_product gate_up[] = {product(identity), product(identity)}, down[] = {product(identity)};
  secateurs_block b = {};
  b.dtype = SECATEURS_FP32, b.activation = SECATEURS_SILU;
  b.width = b.dim = b.inner = 4, b.heads = b.kv_heads = 1, b.scaling = 100.0f, b.residual = 1;
  b.attention_norm = b.mlp_norm = ones;
  b.out = {out, no_biases, 1, kernel, SECATEURS_FP32, 4};
  b.down = {down, no_biases, 1, kernel, SECATEURS_FP32, 4};
  b.qkv[0] = {qkv, no_biases, 3, kernel, SECATEURS_FP32, 12};
  b.gate_up[0] = {gate_up, no_biases, 2, kernel, SECATEURS_FP32, 8};
  /* n = (1, -1, 1, -1); the first key's score is 400 above the others', so its value is what attention gives */
  float x[4] = {2, -2, 2, -2}, cos[2] = {1, 1}, sin[2] = {0, 0};
  float keys[12] = {1, -1, 1, -1}, values[12] = {1, 5, -1, -1, 9, 9, 9, 9};
  const int32_t wrong = secateurs_decode(&b, x, x, cos, sin, SECATEURS_FP32, 2, keys, values, 3, 2, 1);
  /* h = (3, 3, 1, -3), whose mean square is 7; each gains m silu(m) of m = h / sqrt(7) */
  const double hs[] = {3, 3, 1, -3};
  bool good = wrong == 0;
  for (int i = 0; i < 4; ++i) {
    const double m = hs[i] / sqrt(7.0), wanted = hs[i] + m * m / (1 + exp(-m));
    good = good && fabs(x[i] - wanted) <= 1e-5;
  }
  ++runs;
  if (!good) {
    ++failures;
    printf("a block by hand: %g %g %g %g, code %d\n", x[0], x[1], x[2], x[3], wrong);
  }
  const auto refuses = [&](const char* what, int64_t rotated, int64_t room, int64_t tokens, int32_t threads) {
    ++runs;
    if (secateurs_decode(&b, x, x, cos, sin, SECATEURS_FP32, rotated, keys, values, room, tokens, threads) == SECATEURS_BAD_ARGUMENT) return;
    ++failures;
    printf("not refused: %s\n", what);
  };
  refuses("no room", 2, 2, 2, 1);
  refuses("an odd rotation", 1, 3, 2, 1);
  refuses("a rotation of more than a head", 6, 3, 2, 1);
  refuses("no threads", 2, 3, 2, 0);
  b.kv_heads = 2;
  refuses("heads that are no groups", 2, 3, 2, 1);
  b.kv_heads = 1;
  b.out.kernel = secateurs_kernels();
  ++runs;
  if (secateurs_decode(&b, x, x, cos, sin, SECATEURS_FP32, 2, keys, values, 3, 2, 1) != SECATEURS_BAD_KERNEL) {
    ++failures;
    printf("not refused: a kernel beyond the last\n");
  }
}
}  // namespace

int main(int argc, char** argv) {
  const char* word = argc > 1 ? argv[1] : "";
  secateurs_use_threads(threads_of_test);
  int ran = 0;
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    const bool known = !bits_of(row.dtype) || !strcmp(row.dtype, "int8") || !strcmp(row.dtype, "int4");
    if (strcmp(row.format, "dense") || strcmp(row.strategy, "stream") || !known || !strstr(row.name, word)) continue;
    if (!row.runnable) {
      printf("NOT RUN, this CPU lacks %s: %s\n", row.isa, row.name);
      continue;
    }
    if (!strcmp(row.dtype, "fp32")) by_hand(k);
    Random random{0x9e3779b97f4a7c15ULL + static_cast<uint64_t>(k)};
    const int64_t dims[] = {2, 8, 14, 16, 18, 48, 64}, heads[][2] = {{1, 1}, {4, 2}, {3, 1}, {6, 1}, {7, 7}, {8, 2}};
    for (int64_t dim : dims)
      for (int64_t tokens : {0, 1, 14, 15, 16, 40}) {
        const auto& of = heads[random.below(6)];
        const int64_t width = 15 + random.below(70), inner = 1 + random.below(90), rotated = random.below(3) ? dim : random.below(dim / 2 + 1) * 2;
        const Form& form = FORMS[random.below(sizeof(FORMS) / sizeof(*FORMS))];
        one(random, k, row, {width, of[0], of[1], dim, inner, rotated, tokens}, form, static_cast<int32_t>(random.below(2)));
      }
    /* so many that threads share the heads */
    one(random, k, row, {32, 8, 4, 64, 32, 64, 700}, FORMS[1], SECATEURS_SILU);
    /* norms of more numbers than a block is wide */
    for (const Form& form : FORMS) one(random, k, row, {16, 6, 2, 18, 40, 8, 15}, form, SECATEURS_GELU_TANH);
    ++ran;
  }
  printf("%d kernels, %d checks, %d failures\n", ran, runs, failures);
  return failures || !ran ? 1 : 0;
}
