/* Random problems through all kernels, and random bytes through the reader: what it accepts, every kernel runs in buffers
   of the exact size. Meant for the sanitizers. Usage: fuzz [seconds] [seed]; a failure prints its seed. */
#include <time.h>

#include "oracle.h"

namespace {

/* a mask and a count from hostile bytes: mostly nonsense, sometimes one bit away from sound */
int hostile(Random& random) {
  const int64_t outputs = 1 + random.below(13), inputs = 1 + random.below(150);
  const int64_t panels = (outputs + 3) / 4, words = (inputs + 63) / 64;
  const Problem sound(random, "fp32", outputs, inputs, random.uniform(), 0);
  std::vector<uint64_t> mask = sound.mask;
  int64_t survivors = sound.survivors;
  const int64_t kind = random.below(4);
  if (kind == 0)
    for (uint64_t& word : mask) word = random.bits();
  if (kind == 1) mask[static_cast<size_t>(random.below(panels * words * 4))] ^= uint64_t{1} << random.below(64);
  if (kind == 2) survivors += random.below(9) - 4;
  std::vector<int64_t> starts(static_cast<size_t>(panels) + 1);
  int64_t where[2];
  if (survivors < 0 || secateurs_check_bitmask(mask.data(), outputs, inputs, survivors, starts.data(), where)) return 0;
  for (const char* dtype : {"bf16", "fp16", "fp32"}) {
    const int size = itemsize(dtype);
    Exact values(static_cast<size_t>(survivors * size + 64));
    for (size_t i = 0; i < values.nbytes; ++i) values.data[i] = static_cast<char>(random.bits());
    const int64_t tokens = 1 + random.below(70);
    Exact x(static_cast<size_t>(tokens * inputs * size)), y(static_cast<size_t>(tokens * outputs * size));
    secateurs_product product = {{outputs, inputs, mask.data(), values.data, starts.data(), where[1], nullptr, nullptr}, nullptr};
    std::vector<int64_t> step_starts(starts.size());
    const std::unique_ptr<Exact> steps = Problem::steps_of(product.weight, step_starts, size);
    for (int32_t k = 0; k < secateurs_kernels(); ++k) {
      secateurs_kernel row;
      secateurs_kernel_info(k, &row);
      if (row.runnable && !strcmp(row.format, "bitmask") && !strcmp(row.dtype, dtype))
        if (secateurs_linear(k, &product, 1, x.data, y.data, tokens, 1) != SECATEURS_OK) return 1;
    }
  }
  return 0;
}

int sound(Random& random) {
  const char* dtypes[] = {"bf16", "fp16", "fp32"};
  const std::string dtype = dtypes[random.below(3)];
  const int64_t outputs = 1 + random.below(60), inputs = 1 + random.below(random.below(4) ? 300 : 1500), tokens = 1 + random.below(90);
  const size_t size = static_cast<size_t>(itemsize(dtype)), skew = static_cast<size_t>(random.below(3)) * size;
  const double densities[] = {random.uniform(), random.uniform() * 0.01, -2, -1};
  const Problem problem(random, dtype, outputs, inputs, densities[random.below(4)], skew);
  Exact x(static_cast<size_t>(tokens * inputs) * size, skew);
  for (int64_t i = 0; i < tokens * inputs; ++i) put(dtype, x.data + static_cast<size_t>(i) * size, static_cast<float>(random.uniform() * 2 - 1));
  int bad = 0;
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    if (row.runnable && dtype == row.dtype) bad += check(k, row, problem, x.data, nullptr, tokens, 1, "fuzzed");
  }
  return bad;
}
}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 5;
  uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : static_cast<uint64_t>(time(nullptr));
  const time_t end = time(nullptr) + static_cast<time_t>(seconds);
  long rounds = 0;
  do {
    Random random{seed * 0x9e3779b97f4a7c15ULL + 1};
    if (sound(random) || hostile(random)) {
      printf("FAILED with seed %llu\n", static_cast<unsigned long long>(seed));
      return 1;
    }
    ++seed;
    ++rounds;
  } while (time(nullptr) < end);
  printf("%ld rounds, no failure\n", rounds);
  return 0;
}
