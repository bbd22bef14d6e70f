/* Random problems through all kernels, and random bytes through the reader: what it accepts, every kernel runs in buffers
   of the exact size. Meant for the sanitizers. Usage: fuzz [seconds] [seed]; a failure prints its seed. */
#include <time.h>

#include "oracle.h"

namespace {

/* a mask and a count from hostile bytes: mostly nonsense, sometimes one bit away from sound */
int hostile(Random& random) {
  const int64_t outputs = 1 + random.below(13), inputs = 1 + random.below(150);
  const int64_t panels = (outputs + 3) / 4, words = (inputs + 63) / 64;
  const int32_t bits = random.below(2) ? 0 : static_cast<int32_t>(2 + random.below(7));
  const Problem sound(random, bits ? "int" + std::to_string(bits) : "fp32", "fp32", outputs, inputs, random.uniform(), 0);
  std::vector<uint64_t> mask = sound.mask;
  int64_t stored = sound.starts.back();
  const int64_t kind = random.below(4);
  if (kind == 0)
    for (uint64_t& word : mask) word = random.bits();
  if (kind == 1) mask[static_cast<size_t>(random.below(panels * words * 4))] ^= uint64_t{1} << random.below(64);
  if (kind == 2) stored += random.below(9) - 4;
  std::vector<int64_t> starts(static_cast<size_t>(panels) + 1);
  int64_t where[4];
  if (stored < 0 || secateurs_check_bitmask(mask.data(), outputs, inputs, bits, stored, starts.data(), where)) return 0;
  /* any scales, zeros and bytes of integers are as good as others to a kernel */
  Exact scale(static_cast<size_t>(panels * 4 * sound.groups * 2)), zero(static_cast<size_t>(panels * 4 * sound.groups));
  for (size_t i = 0; i < scale.nbytes; ++i) scale.data[i] = static_cast<char>(random.bits());
  for (size_t i = 0; i < zero.nbytes; ++i) zero.data[i] = static_cast<char>(random.bits());
  for (const char* dtype : {"bf16", "fp16", "fp32"}) {
    const int size = itemsize(dtype);
    const int64_t all = panels * words * 4 * 8 * bits;
    Exact values(static_cast<size_t>(stored * (bits ? 1 : size) + 64)), dense(static_cast<size_t>(all + 64));
    for (size_t i = 0; i < values.nbytes; ++i) values.data[i] = static_cast<char>(random.bits());
    for (size_t i = 0; i < dense.nbytes; ++i) dense.data[i] = static_cast<char>(random.bits());
    const int64_t tokens = 1 + random.below(70);
    Exact x(static_cast<size_t>(tokens * inputs * size)), y(static_cast<size_t>(tokens * outputs * size));
    for (size_t i = 0; i < x.nbytes; ++i) x.data[i] = static_cast<char>(random.bits());
    secateurs_weight packed = {outputs, inputs, mask.data(), values.data, starts.data(), where[1], nullptr, nullptr,
                               bits, sound.group, sound.half, nullptr, nullptr, nullptr};
    /* also of masks that no kernel of `pairs` may be given: nothing is written beyond the layout */
    Exact pairs(static_cast<size_t>(panels * words * (32 + 16 * bits)));
    if (bits == 8 || bits == 4) {
      packed.pairs = pairs.data;
      secateurs_fill_pairs(&packed, 1);
    }
    if (bits) {
      packed.scale = reinterpret_cast<const uint16_t*>(scale.data);
      if (random.below(2)) packed.zero = reinterpret_cast<const uint8_t*>(zero.data);
      std::vector<uint8_t> codes(static_cast<size_t>(outputs * inputs));
      secateurs_read_integers(&packed, codes.data());
    }
    std::vector<int64_t> step_starts(starts.size());
    const std::unique_ptr<Exact> steps = bits ? nullptr : Problem::steps_of(packed, step_starts, size);
    for (int32_t k = 0; k < secateurs_kernels(); ++k) {
      secateurs_kernel row;
      secateurs_kernel_info(k, &row);
      const bool of_all = !strcmp(row.format, "dense");
      if (!row.runnable || bits_of(row.dtype) != bits || (!bits && (of_all || strcmp(row.dtype, dtype)))) continue;
      secateurs_product product = {packed, nullptr};
      if (of_all) {
        product.weight.mask = nullptr;
        product.weight.values = dense.data;
      }
      const bool refused = product.weight.zero && !strcmp(row.strategy, "pairs");
      if (secateurs_linear(k, &product, 1, x.data, y.data, dtype_of(dtype), tokens, 1) != (refused ? SECATEURS_BAD_ARGUMENT : SECATEURS_OK)) return 1;
    }
  }
  return 0;
}

int sound(Random& random) {
  const char* kinds[] = {"bf16", "fp16", "fp32", "int8", "int6", "int5", "int4", "int3", "int2"};
  const std::string stored = kinds[random.below(9)], dtype = dtype_for(random, stored);
  const int64_t outputs = 1 + random.below(60), inputs = 1 + random.below(random.below(4) ? 300 : 1500), tokens = 1 + random.below(90);
  const size_t size = static_cast<size_t>(itemsize(dtype)), skew = static_cast<size_t>(random.below(3)) * size;
  const double densities[] = {random.uniform(), random.uniform() * 0.01, -2, -1};
  /* a third of them so that kernels of the strategy `pairs` take them, too */
  const bool pairs = !random.below(3) && bits_of(stored) % 4 == 0 && bits_of(stored);
  const Problem problem(random, stored, dtype, outputs, inputs, pairs ? Problem::TWO : densities[random.below(4)], skew, pairs);
  Exact x(static_cast<size_t>(tokens * inputs) * size, skew);
  for (int64_t i = 0; i < tokens * inputs; ++i) put(dtype, x.data + static_cast<size_t>(i) * size, static_cast<float>(random.uniform() * 2 - 1));
  int bad = 0;
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    if (row.runnable && stored == row.dtype && (pairs || strcmp(row.strategy, "pairs"))) bad += check(k, row, problem, x.data, nullptr, tokens, 1, "fuzzed");
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
