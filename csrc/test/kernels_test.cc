/* Every kernel that this CPU can run against the double loop: sizes around each tile, misaligned pointers, threads. */
#include <thread>

#include "oracle.h"

namespace {
int failures = 0, runs = 0;

void expect(bool good, const char* what) {
  ++runs;
  if (good) return;
  ++failures;
  printf("FAILED: %s\n", what);
}

int32_t threads_of_test(int64_t begin, int64_t end, int64_t, secateurs_range fn, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = begin; i < end; ++i) threads.emplace_back([=] { fn(i, i + 1, context); });
  for (std::thread& t : threads) t.join();
  return 0;
}

void products(int32_t kernel, const secateurs_kernel& row) {
  Random random{0x9e3779b97f4a7c15ULL + static_cast<uint64_t>(kernel)};
  const int64_t outputs[] = {1, 3, 4, 5, 23, 25, 67}, inputs[] = {1, 63, 64, 65, 200, 513, 1100};
  const int64_t tokens[] = {1, 2, 3, 4, 5, 15, 16, 17, 33, 48, 63, 64, 65, 130};
  for (int64_t o : outputs)
    for (int64_t i : inputs)
      for (double density : {0.0, 0.003, 0.1, 0.5, 1.0, -2.0, -1.0}) {
        const size_t skew = static_cast<size_t>(random.below(4)) * static_cast<size_t>(itemsize(row.dtype));
        const Problem problem(random, row.dtype, o, i, density, skew);
        /* the longest rows are for positions, which do not depend on tokens */
        const int64_t t = tokens[random.below(i > 1000 ? 5 : 14)];
        Exact x(static_cast<size_t>(t * i * itemsize(row.dtype)), skew), bias(static_cast<size_t>(o * itemsize(row.dtype)), skew);
        for (int64_t k = 0; k < t * i; ++k) put(row.dtype, x.data + k * itemsize(row.dtype), static_cast<float>(random.uniform() * 2 - 1));
        for (int64_t k = 0; k < o; ++k) put(row.dtype, bias.data + k * itemsize(row.dtype), static_cast<float>(random.uniform()));
        const std::string where = std::to_string(o) + "x" + std::to_string(i) + ", " + std::to_string(t) + " tokens, density " +
                                  std::to_string(density);
        for (int32_t threads : {1, 3}) {
          ++runs;
          failures += check(kernel, row, problem, x.data, random.below(2) ? bias.data : nullptr, t, threads, where) != 0;
        }
      }
}

/* two matrices on one input give what each gives alone, bit for bit */
void together(int32_t kernel, const secateurs_kernel& row) {
  Random random{77};
  const Problem a(random, row.dtype, 30, 130, 0.4, 0), b(random, row.dtype, 9, 130, 0.7, 0);
  const bool packed = !strcmp(row.format, "bitmask");
  const int size = itemsize(row.dtype);
  for (int64_t tokens : {1, 7, 20}) {
    Exact x(static_cast<size_t>(tokens * 130 * size)), both(static_cast<size_t>(tokens * 39 * size)), alone(both.nbytes);
    for (int64_t k = 0; k < tokens * 130; ++k) put(row.dtype, x.data + k * size, static_cast<float>(random.uniform()));
    const secateurs_product pair[] = {{a.weight(packed), nullptr}, {b.weight(packed), nullptr}};
    secateurs_linear(kernel, pair, 2, x.data, both.data, tokens, 2);
    secateurs_linear(kernel, pair, 1, x.data, alone.data, tokens, 1);
    secateurs_linear(kernel, pair + 1, 1, x.data, alone.data + tokens * 30 * size, tokens, 1);
    expect(!memcmp(both.data, alone.data, both.nbytes), "products that share an input equal those alone");
  }
}

void numbers() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    const float b = bf16_to_float(half), h = fp16_to_float(half);
    if (b == b && bf16_from_float(b) != half) expect(false, "bf16 survives a round trip");
    if (h == h && fp16_from_float(h) != half) expect(false, "fp16 survives a round trip");
    if (b != b && !(bf16_to_float(bf16_from_float(b)) != bf16_to_float(bf16_from_float(b)))) expect(false, "bf16 NaN stays NaN");
    if (h != h && !(fp16_to_float(fp16_from_float(h)) != fp16_to_float(fp16_from_float(h)))) expect(false, "fp16 NaN stays NaN");
  }
  expect(fp16_from_float(65519.9f) == 0x7bff && fp16_from_float(65520.0f) == 0x7c00, "fp16 overflows at 65520");
  expect(bf16_from_float(1.00390625f) == 0x3f80 && bf16_from_float(1.01171875f) == 0x3f82, "bf16 ties go to even");
}

void masks() {
  int64_t starts[3], where[2];
  const uint64_t sound[8] = {1, 0, 3, 0, 7, 0, 0, 0};
  expect(secateurs_check_bitmask(sound, 5, 64, 6, starts, where) == 0 && starts[1] == 3 && starts[2] == 6 && where[1] == 3, "a sound mask");
  expect(secateurs_check_bitmask(sound, 5, 64, 7, starts, where) == 3 && where[0] == 6, "another count of survivors");
  const uint64_t spread[4] = {0x0101010101010101, 0, 0x8000000000000000, 0x4200};
  expect(secateurs_check_bitmask(spread, 4, 64, 11, starts, where) == 0 && where[0] == 11 && where[1] == 2, "the most survivors of a byte");
  const uint64_t alone[4] = {0x0101010101010101, 0, 1, 0};
  expect(secateurs_check_bitmask(alone, 4, 64, 9, starts, where) == 0 && where[1] == 1, "no more than one survivor of a byte");
  const uint64_t beyond_row[8] = {0, 0, 0, 0, 0, 4, 0, 0};
  expect(secateurs_check_bitmask(beyond_row, 5, 64, 1, starts, where) == 2 && where[0] == 5 && where[1] == 2, "a bit beyond the last row");
  const uint64_t beyond_input[4] = {0, 1ULL << 10, 0, 0};
  expect(secateurs_check_bitmask(beyond_input, 4, 10, 1, starts, where) == 1 && where[0] == 1 && where[1] == 10, "a bit beyond the last input");
}

/* two steps by hand: row 0 keeps inputs 1, 300 and 301, row 2 keeps 5; 300 is too far from 0 for the second lane */
void steps() {
  const float kept[] = {1, 2, 3, 4};
  std::vector<uint64_t> mask(5 * 4);
  mask[0] = 1ULL << 1;
  mask[2] = 1ULL << 5;
  mask[16] = 3ULL << 44;
  const float values[] = {kept[0], kept[3], kept[1], kept[2]};
  int64_t starts[2], where[2], step_starts[2];
  expect(secateurs_check_bitmask(mask.data(), 4, 320, 4, starts, where) == 0, "a mask of few survivors");
  secateurs_weight w = {4, 320, mask.data(), values, starts, where[1], nullptr, nullptr};
  expect(secateurs_count_steps(&w, step_starts) == 3 && step_starts[0] == 0 && step_starts[1] == 3, "slots are counted with what is too far");
  Exact made(3 * 40);
  w.steps = made.data;
  w.step_starts = step_starts;
  secateurs_fill_steps(&w, 4, 1);
  /* slots of row 0: input 1; a zero at 255; 300 (299 after 1: a zero at 256 first); 300 (45 after 255); 301 (45 after 256) */
  const int distances[3][8] = {{1, 0, 5, 0, 255, 0, 0, 0}, {255, 0, 0, 0, 45, 0, 0, 0}, {45, 0, 0, 0, 0, 0, 0, 0}};
  const float wanted[3][8] = {{1, 0, 4, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 2, 0, 0, 0}, {3, 0, 0, 0, 0, 0, 0, 0}};
  for (int s = 0; s < 3; ++s) {
    bool same = !memcmp(made.data + 40 * s + 8, wanted[s], 32);
    for (int i = 0; i < 8; ++i) same = same && static_cast<unsigned char>(made.data[40 * s + i]) == distances[s][i];
    expect(same, "a step by hand");
  }
}

void arguments() {
  Random random{5};
  const Problem problem(random, "fp32", 4, 64, 0.5, 0);
  const secateurs_product product = {problem.weight(true), nullptr};
  float x[64] = {}, y[4];
  expect(secateurs_linear(-1, &product, 1, x, y, 1, 1) == SECATEURS_BAD_KERNEL, "kernel -1 is refused");
  expect(secateurs_linear(secateurs_kernels(), &product, 1, x, y, 1, 1) == SECATEURS_BAD_KERNEL, "a kernel beyond the last is refused");
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    if (!strcmp(row.format, "dense"))
      expect(secateurs_linear(k, &product, 1, x, y, 1, 1) == SECATEURS_BAD_ARGUMENT, "a dense kernel refuses packed weights");
    else
      expect(secateurs_linear(k, &product, 1, x, y, 0, 1) == SECATEURS_OK, "no tokens are no work");
    secateurs_product bare = product;
    bare.weight.step_starts = nullptr;
    if (!strcmp(row.strategy, "gather"))
      expect(secateurs_linear(k, &bare, 1, x, y, 1, 1) == SECATEURS_BAD_ARGUMENT, "a gather kernel refuses weights without steps");
  }
}
}  // namespace

int main() {
  secateurs_use_threads(threads_of_test);
  numbers();
  masks();
  steps();
  arguments();
  int ran = 0;
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    if (!row.runnable) {
      printf("NOT RUN, this CPU lacks %s: %s\n", row.isa, row.name);
      continue;
    }
    products(k, row);
    together(k, row);
    ++ran;
  }
  printf("%d kernels, %d checks, %d failures\n", ran, runs, failures);
  return failures || !ran ? 1 : 0;
}
