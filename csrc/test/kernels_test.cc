/* Every kernel that this CPU can run against the double loop: sizes around each tile, misaligned pointers, threads.
   Usage: kernels_test [WORD]; WORD: only kernels whose name holds it. */
#include <malloc.h>
#include <sys/resource.h>

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
        /* six numbers of bits share most of their code */
        if (bits_of(row.dtype) && random.below(3)) continue;
        const std::string dtype = dtype_for(random, row.dtype);
        const size_t size = static_cast<size_t>(itemsize(dtype)), skew = static_cast<size_t>(random.below(4)) * size;
        const Problem problem = problem_for(random, row, dtype, o, i, density, skew);
        /* the longest rows are for positions, which do not depend on tokens */
        const int64_t t = tokens[random.below(i > 1000 ? 5 : 14)];
        Exact x(static_cast<size_t>(t * i) * size, skew), bias(static_cast<size_t>(o) * size, skew);
        for (int64_t k = 0; k < t * i; ++k) put(dtype, x.data + static_cast<size_t>(k) * size, static_cast<float>(random.uniform() * 2 - 1));
        for (int64_t k = 0; k < o; ++k) put(dtype, bias.data + static_cast<size_t>(k) * size, static_cast<float>(random.uniform()));
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
  const std::string dtype = dtype_for(random, row.dtype);
  const Problem a = problem_for(random, row, dtype, 30, 130, 0.4, 0), b = problem_for(random, row, dtype, 9, 130, 0.7, 0);
  const bool packed = !strcmp(row.format, "bitmask");
  const int size = itemsize(dtype);
  for (int64_t tokens : {1, 7, 20}) {
    Exact x(static_cast<size_t>(tokens * 130 * size)), both(static_cast<size_t>(tokens * 39 * size)), alone(both.nbytes);
    for (int64_t k = 0; k < tokens * 130; ++k) put(dtype, x.data + k * size, static_cast<float>(random.uniform()));
    const secateurs_product pair[] = {{a.weight(packed), nullptr}, {b.weight(packed), nullptr}};
    secateurs_linear(kernel, pair, 2, x.data, both.data, dtype_of(dtype), tokens, 2);
    secateurs_linear(kernel, pair, 1, x.data, alone.data, dtype_of(dtype), tokens, 1);
    secateurs_linear(kernel, pair + 1, 1, x.data, alone.data + tokens * 30 * size, dtype_of(dtype), tokens, 1);
    expect(!memcmp(both.data, alone.data, both.nbytes), "products that share an input equal those alone");
  }
}

/* what an earlier call left in the memory that a thread keeps does not matter: here NaN. The last word of x is short; and what
   threads lay out is not a multiple of what they are */
void stale(int32_t kernel, const secateurs_kernel& row) {
  Random random{3};
  const std::string dtype = dtype_for(random, row.dtype);
  const int size = itemsize(dtype);
  const Problem first = problem_for(random, row, dtype, 8, 450, 0.5, 0);
  const Problem few = problem_for(random, row, dtype, 9, 65, 0.5, 0), many = problem_for(random, row, dtype, 9, 450, 0.5, 0);
  const struct {
    const Problem& problem;
    int64_t tokens;
    int32_t threads;
  } cases[] = {{few, 1, 1}, {few, 3, 1}, {few, 40, 1}, {many, 71, 5}};
  for (const auto& c : cases) {
    Exact nan(static_cast<size_t>(c.tokens * 450 * size)), lost(static_cast<size_t>(c.tokens * 8 * size));
    Exact x(static_cast<size_t>(c.tokens * c.problem.inputs * size));
    memset(nan.data, 0xff, nan.nbytes);
    for (int64_t k = 0; k < c.tokens * c.problem.inputs; ++k) put(dtype, x.data + k * size, static_cast<float>(random.uniform()));
    const secateurs_product before = {first.weight(!strcmp(row.format, "bitmask")), nullptr};
    secateurs_linear(kernel, &before, 1, nan.data, lost.data, dtype_of(dtype), c.tokens, 1);
    ++runs;
    failures += check(kernel, row, c.problem, x.data, nullptr, c.tokens, c.threads, "after NaN, " + std::to_string(c.tokens) + " tokens") != 0;
  }
}

/* with ever more memory a call is refused until it is right: first there is no room for x, then none for the sums of its products */
void memory(int32_t kernel, const secateurs_kernel& row) {
#if defined(__SANITIZE_ADDRESS__)
  static_cast<void>(kernel);
  printf("NOT RUN, AddressSanitizer ends a program that has no memory: %s\n", row.name);
#else
  Random random{9};
  const Problem problem(random, row.dtype, "fp32", 4, 64, 1.0, 0);
  const int64_t tokens = 1 << 17;
  const std::vector<float> x(static_cast<size_t>(tokens * 64), 1.0f);
  std::vector<float> y(static_cast<size_t>(tokens * 4));
  const secateurs_product product = {problem.weight(!strcmp(row.format, "bitmask")), nullptr};
  /* in a thread that keeps nothing of earlier calls */
  std::thread([&] {
    long pages = 0;
    if (FILE* file = fopen("/proc/self/statm", "r")) {
      if (fscanf(file, "%ld", &pages) != 1) pages = 0;
      fclose(file);
    }
    if (!pages) return;
    rlimit before;
    getrlimit(RLIMIT_AS, &before);
    const rlimit none = {static_cast<rlim_t>(pages) * 4096, before.rlim_max};
    setrlimit(RLIMIT_AS, &none);
    void* more_than_none = malloc(1 << 25);
    setrlimit(RLIMIT_AS, &before);
    free(more_than_none);
    if (more_than_none) {
      /* an emulator, for one */
      printf("NOT RUN, memory has no limit here: %s\n", row.name);
      return;
    }
    int32_t code = SECATEURS_NO_MEMORY, refused = 0;
    for (rlim_t more = 0; code == SECATEURS_NO_MEMORY && more < 32; ++more) {
      const rlimit limit = {static_cast<rlim_t>(pages) * 4096 + (more << 23), before.rlim_max};
      memset(y.data(), 0xff, y.size() * sizeof(float));
      setrlimit(RLIMIT_AS, &limit);
      code = secateurs_linear(kernel, &product, 1, x.data(), y.data(), SECATEURS_FP32, tokens, 1);
      setrlimit(RLIMIT_AS, &before);
      refused += code == SECATEURS_NO_MEMORY;
    }
    bool numbers = true;
    for (float value : y) numbers = numbers && value == value;
    expect(refused > 1 && code == SECATEURS_OK && numbers, "a call that finds no memory says so");
  }).join();
#endif
}

/* of this process, in memory now */
long resident() {
  long all = 0, pages = 0;
  if (FILE* file = fopen("/proc/self/statm", "r")) {
    if (fscanf(file, "%ld %ld", &all, &pages) != 2) pages = 0;
    fclose(file);
  }
  return pages * 4096;
}

/* A long prompt is multiplied in pieces: a thread keeps 32 MiB, not the 51 MB that all of x takes. Every token gets what it
   gets in a short prompt, from both of two matrices. */
void prompt(int32_t kernel, const secateurs_kernel& row) {
  Random random{11};
  const bool packed = !strcmp(row.format, "bitmask");
  const Problem a = problem_for(random, row, "fp32", 5, 65, 0.5, 0), b = problem_for(random, row, "fp32", 3, 65, 0.5, 0);
  const secateurs_product pair[] = {{a.weight(packed), nullptr}, {b.weight(packed), nullptr}};
  const int64_t few = 97, tokens = 100003, inputs = 65, outputs[] = {5, 3};
  const size_t size = static_cast<size_t>(itemsize("fp32"));
  std::vector<char> x(static_cast<size_t>(tokens * inputs) * size), y(static_cast<size_t>(tokens * 8) * size, '\xff');
  std::vector<char> wanted(static_cast<size_t>(few * 8) * size);
  for (int64_t k = 0; k < few * inputs; ++k) put("fp32", &x[static_cast<size_t>(k) * size], static_cast<float>(random.uniform()));
  for (size_t k = static_cast<size_t>(few * inputs) * size; k < x.size(); ++k) x[k] = x[k - static_cast<size_t>(few * inputs) * size];
  secateurs_linear(kernel, pair, 2, x.data(), wanted.data(), SECATEURS_FP32, few, 1);
  /* in a thread that keeps nothing of earlier calls */
  std::thread([&] {
    const long before = resident();
    expect(secateurs_linear(kernel, pair, 2, x.data(), y.data(), SECATEURS_FP32, tokens, 1) == SECATEURS_OK, "a long prompt");
    const long kept = resident() - before;
#if defined(__SANITIZE_ADDRESS__)
    static_cast<void>(kept);
    printf("NOT RUN, AddressSanitizer keeps memory of its own: what a thread keeps of a long prompt\n");
#else
    expect(kept <= 40 << 20, "what a thread keeps of a long prompt");
#endif
  }).join();
  int bad = 0;
  const char *got = y.data(), *want = wanted.data();
  for (int64_t o : outputs) {
    for (int64_t i = 0; i < tokens * o; ++i) {
      const double one = value_of("fp32", got + static_cast<size_t>(i) * size);
      const double other = value_of("fp32", want + static_cast<size_t>(i % (few * o)) * size);
      /* written so that NaN fails */
      bad += !(fabs(one - other) <= 2 * rounding("fp32") * fabs(other) + 65 * 0x1p-20);
    }
    got += static_cast<size_t>(tokens * o) * size;
    want += static_cast<size_t>(few * o) * size;
  }
  expect(bad == 0, "a token of a long prompt gets what it gets in a short one");
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
  /* NaNs whose payload is all in the bits that go, and one that would round up to a number */
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu}) {
    float nan;
    memcpy(&nan, &bits, 4);
    const float b = bf16_to_float(bf16_from_float(nan)), h = fp16_to_float(fp16_from_float(nan));
    expect(b != b && h != h, "a NaN stays NaN whatever it holds");
  }
  expect(fp16_from_float(65519.9f) == 0x7bff && fp16_from_float(65520.0f) == 0x7c00, "fp16 overflows at 65520");
  expect(bf16_from_float(1.00390625f) == 0x3f80 && bf16_from_float(1.01171875f) == 0x3f82, "bf16 ties go to even");
}

void masks() {
  int64_t starts[3], where[4];
  const uint64_t sound[8] = {1, 0, 3, 0, 7, 0, 0, 0};
  expect(secateurs_check_bitmask(sound, 5, 64, 0, 6, starts, where) == 0 && starts[1] == 3 && starts[2] == 6 && where[1] == 3, "a sound mask");
  expect(secateurs_check_bitmask(sound, 5, 64, 0, 7, starts, where) == 3 && where[0] == 6, "another count of survivors");
  const uint64_t spread[4] = {0x0101010101010101, 0, 0x8000000000000000, 0x4200};
  expect(secateurs_check_bitmask(spread, 4, 64, 0, 11, starts, where) == 0 && where[0] == 11 && where[1] == 2, "the most survivors of a byte");
  const uint64_t alone[4] = {0x0101010101010101, 0, 1, 0};
  expect(secateurs_check_bitmask(alone, 4, 64, 0, 9, starts, where) == 0 && where[1] == 1, "no more than one survivor of a byte");
  const uint64_t twos[4] = {0x9c53000000000000, 0, 0, 6}, three[4] = {0, 0xb0, 0, 0}, four[4] = {0, 0, 15ULL << 60, 0}, across[4] = {0x3c, 0, 0, 0};
  expect(secateurs_check_bitmask(twos, 4, 64, 0, 10, starts, where) == 0 && where[3] == 1, "two of four");
  expect(secateurs_check_bitmask(across, 4, 64, 0, 4, starts, where) == 0 && where[3] == 1, "four in a row, two of each four");
  expect(secateurs_check_bitmask(three, 4, 64, 0, 3, starts, where) == 0 && where[3] == 0, "three of four");
  expect(secateurs_check_bitmask(four, 4, 64, 0, 4, starts, where) == 0 && where[3] == 0, "four of four");
  const uint64_t beyond_row[8] = {0, 0, 0, 0, 0, 4, 0, 0};
  expect(secateurs_check_bitmask(beyond_row, 5, 64, 0, 1, starts, where) == 2 && where[0] == 5 && where[1] == 2, "a bit beyond the last row");
  const uint64_t beyond_input[4] = {0, 1ULL << 10, 0, 0};
  expect(secateurs_check_bitmask(beyond_input, 4, 10, 0, 1, starts, where) == 1 && where[0] == 1 && where[1] == 10, "a bit beyond the last input");
  /* runs of 1, 2 and 3 survivors of 3 bits take 1, 1 and 2 bytes; of 8 bits as many bytes as survivors */
  expect(secateurs_check_bitmask(sound, 5, 64, 3, 4, starts, where) == 0 && starts[1] == 2 && starts[2] == 4 && where[2] == 6, "bytes of 3 bits");
  expect(secateurs_check_bitmask(sound, 5, 64, 8, 6, starts, where) == 0 && starts[1] == 3 && where[1] == 3, "bytes of 8 bits");
  expect(secateurs_check_bitmask(sound, 5, 64, 3, 6, starts, where) == 3 && where[0] == 4, "another number of bytes");
}

/* integers are written as the oracle's bits are, and read again */
void integers() {
  Random random{31};
  for (int bits = 2; bits <= 8; ++bits)
    for (double density : {0.0, 0.4, 1.0, -2.0})
      for (int64_t inputs : {1, 64, 130})
        for (bool packed : {true, false}) {
          const Problem problem(random, "int" + std::to_string(bits), "fp32", 7, inputs, density, 1);
          const Exact& stored = packed ? *problem.values : *problem.matrix;
          Exact made(stored.nbytes, 1);
          std::vector<uint8_t> codes(problem.codes.size());
          secateurs_weight w = problem.weight(packed);
          secateurs_read_integers(&w, codes.data());
          expect(codes == problem.codes, "integers are read");
          w.values = made.data;
          secateurs_write_integers(&w, problem.codes.data());
          /* what the oracle leaves zero beyond the matrix has the code of zero */
          secateurs_read_integers(&w, codes.data());
          expect(codes == problem.codes, "integers are read as they were written");
          expect(!packed || !memcmp(made.data, stored.data, stored.nbytes), "integers are written");
          w = problem.weight(packed);
          for (const char* dtype : {"bf16", "fp16", "fp32"}) {
            const std::vector<int64_t> rows = {6, 0, 3, 3};
            const size_t size = static_cast<size_t>(itemsize(dtype));
            Exact found(rows.size() * static_cast<size_t>(inputs) * size), wanted(found.nbytes);
            for (size_t k = 0; k < rows.size() * static_cast<size_t>(inputs); ++k)
              put(dtype, wanted.data + k * size,
                  static_cast<float>(problem.exact[static_cast<size_t>(rows[k / static_cast<size_t>(inputs)] * inputs) + k % static_cast<size_t>(inputs)]) + 0.0f);
            const int32_t code = secateurs_rows(&w, rows.data(), 4, dtype_of(dtype), found.data);
            expect(packed ? code == SECATEURS_BAD_ARGUMENT : code == SECATEURS_OK && !memcmp(found.data, wanted.data, found.nbytes), "rows");
            for (int64_t beyond : {-1, 7}) expect(secateurs_rows(&w, &beyond, 1, dtype_of(dtype), found.data) == SECATEURS_BAD_ARGUMENT, "a row that is not there");
          }
        }
}

/* one number that is none makes all of a token's outputs NaN, as zeros do in a float kernel; other tokens keep theirs */
void not_numbers(int32_t kernel, const secateurs_kernel& row) {
  Random random{41};
  for (const char* dtype : {"bf16", "fp16", "fp32"})
    for (double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity()})
      for (int64_t tokens : {1, 3, 20}) {
        const Problem problem = problem_for(random, row, dtype, 6, 100, 0.5, 0);
        const size_t size = static_cast<size_t>(itemsize(dtype));
        Exact x(static_cast<size_t>(tokens * 100) * size);
        for (int64_t k = 0; k < tokens * 100; ++k) put(dtype, x.data + static_cast<size_t>(k) * size, static_cast<float>(random.uniform()));
        put(dtype, x.data + static_cast<size_t>((tokens - 1) * 100 + random.below(100)) * size, static_cast<float>(bad));
        ++runs;
        failures += check(kernel, row, problem, x.data, nullptr, tokens, 1, "not a number") != 0;
      }
}

/* blocks whose numbers are tiny, huge or all zero */
void ranges(int32_t kernel, const secateurs_kernel& row) {
  Random random{43};
  for (double size : {0.0, 0x1p-149, 0x1p-101, 0x1p-100, 0x1p-60, 0x1p100})
    for (int64_t tokens : {1, 20}) {
      const Problem problem = problem_for(random, row, "fp32", 6, 70, 0.5, 0);
      Exact x(static_cast<size_t>(tokens * 70 * 4));
      for (int64_t k = 0; k < tokens * 70; ++k) put("fp32", x.data + 4 * k, static_cast<float>(size * (random.uniform() - 0.5)));
      ++runs;
      failures += check(kernel, row, problem, x.data, nullptr, tokens, 1, "numbers of size " + std::to_string(log2(size))) != 0;
    }
}

/* two steps by hand: row 0 keeps inputs 1, 300 and 301, row 2 keeps 5; 300 is too far from 0 for the second lane */
void steps() {
  const float kept[] = {1, 2, 3, 4};
  std::vector<uint64_t> mask(5 * 4);
  mask[0] = 1ULL << 1;
  mask[2] = 1ULL << 5;
  mask[16] = 3ULL << 44;
  const float values[] = {kept[0], kept[3], kept[1], kept[2]};
  int64_t starts[2], where[4], step_starts[2];
  expect(secateurs_check_bitmask(mask.data(), 4, 320, 0, 4, starts, where) == 0, "a mask of few survivors");
  secateurs_weight w = {4, 320, mask.data(), values, starts, where[1], nullptr, nullptr, 0, 0, 0, nullptr, nullptr, nullptr};
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

/* A word by hand: row 0 keeps inputs 1 and 3, row 2 keeps 62; codes -128 and 5 of 8 bits, or -8 and 5 of 4; then -3. */
void pairs() {
  const uint64_t mask[4] = {10, 0, 1ULL << 62, 0};
  const uint8_t of_eight[] = {0x00, 0x85, 0x7d}, of_four[] = {0xd0, 0x05};
  const uint16_t scale[4] = {};
  const int64_t starts[2] = {0, 3};
  for (int bits : {8, 4}) {
    secateurs_weight w = {3, 63, mask, bits == 8 ? of_eight : of_four, starts, 2, nullptr, nullptr, bits, 0, 0, scale, nullptr, nullptr};
    Exact made(static_cast<size_t>(32 + 16 * bits));
    memset(made.data, 0xff, made.nbytes);
    w.pairs = made.data;
    secateurs_fill_pairs(&w, 1);
    std::string wanted(32, '\0');
    wanted += bits == 8 ? std::string(128, '\0') : std::string(64, '\x88');
    /* k = 0: lanes 0 and 1, places 1 and 3; k = 3 of the second block: the second four's first place, which is 2 */
    wanted[0] = 1;
    wanted[1] = 3;
    wanted[16 + 8 + 2] = static_cast<char>(2 << 6);
    if (bits == 8) {
      wanted[32] = static_cast<char>(-128);
      wanted[33] = 5;
      wanted[32 + 3 * 32 + 26] = -3;
    } else {
      wanted[32] = static_cast<char>(0x80);
      wanted[33] = static_cast<char>(0x8d);
      wanted[32 + 32 + 26] = static_cast<char>(0x58);
    }
    expect(!memcmp(made.data, wanted.data(), wanted.size()), "pairs by hand");
  }
}

void arguments() {
  Random random{5};
  const Problem problem(random, "fp32", "fp32", 4, 64, 0.5, 0);
  const secateurs_product product = {problem.weight(true), nullptr};
  float x[64] = {}, y[4];
  expect(secateurs_linear(-1, &product, 1, x, y, SECATEURS_FP32, 1, 1) == SECATEURS_BAD_KERNEL, "kernel -1 is refused");
  expect(secateurs_linear(secateurs_kernels(), &product, 1, x, y, SECATEURS_FP32, 1, 1) == SECATEURS_BAD_KERNEL, "a kernel beyond the last is refused");
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    const int32_t of_kernel = bits_of(row.dtype) ? SECATEURS_FP32 : dtype_of(row.dtype);
    if (!strcmp(row.format, "dense"))
      expect(secateurs_linear(k, &product, 1, x, y, of_kernel, 1, 1) == SECATEURS_BAD_ARGUMENT, "a dense kernel refuses packed weights");
    else if (!bits_of(row.dtype))
      expect(secateurs_linear(k, &product, 1, x, y, of_kernel, 0, 1) == SECATEURS_OK, "no tokens are no work");
    expect(secateurs_linear(k, &product, 1, x, y, 3, 1, 1) == SECATEURS_BAD_ARGUMENT, "there is no dtype 3");
    if (const int bits = bits_of(row.dtype)) {
      const Problem whole = problem_for(random, row, "fp32", 4, 64, 0.5, 0);
      const bool packed = !strcmp(row.format, "bitmask");
      const auto refuses = [&](const char* what, auto change) {
        secateurs_product other = {whole.weight(packed), nullptr};
        change(other.weight);
        expect(secateurs_linear(k, &other, 1, x, y, SECATEURS_FP32, 1, 1) == SECATEURS_BAD_ARGUMENT, what);
      };
      refuses("integers of other bits", [&](secateurs_weight& w) { w.bits = bits == 8 ? 4 : 8; });
      refuses("floats", [](secateurs_weight& w) { w.bits = 0; });
      refuses("integers without scales", [](secateurs_weight& w) { w.scale = nullptr; });
      refuses("a group of 48", [](secateurs_weight& w) { w.group = 48; });
      if (!strcmp(row.strategy, "pairs")) {
        const uint8_t zeros[4] = {};
        refuses("no pairs", [](secateurs_weight& w) { w.pairs = nullptr; });
        refuses("zeros of groups", [&](secateurs_weight& w) { w.zero = zeros; });
      }
      refuses("the other format", [&](secateurs_weight& w) { w = whole.weight(!packed); });
      continue;
    }
    for (int32_t other : {SECATEURS_BF16, SECATEURS_FP16, SECATEURS_FP32})
      if (other != dtype_of(row.dtype))
        expect(secateurs_linear(k, &product, 1, x, y, other, 1, 1) == SECATEURS_BAD_ARGUMENT, "x of another dtype than the kernel's");
    secateurs_product bare = product;
    bare.weight.step_starts = nullptr;
    if (!strcmp(row.strategy, "gather"))
      expect(secateurs_linear(k, &bare, 1, x, y, of_kernel, 1, 1) == SECATEURS_BAD_ARGUMENT, "a gather kernel refuses weights without steps");
  }
}
}  // namespace

int main(int argc, char** argv) {
  const char* word = argc > 1 ? argv[1] : "";
  /* what the C library keeps for threads would serve a call that finds no memory */
  mallopt(M_ARENA_MAX, 1);
  mallopt(M_MMAP_THRESHOLD, 1 << 20);
  secateurs_use_threads(threads_of_test);
  numbers();
  masks();
  integers();
  steps();
  pairs();
  arguments();
  int ran = 0;
  for (int32_t k = 0; k < secateurs_kernels(); ++k) {
    secateurs_kernel row;
    secateurs_kernel_info(k, &row);
    if (!strstr(row.name, word)) continue;
    if (!row.runnable) {
      printf("NOT RUN, this CPU lacks %s: %s\n", row.isa, row.name);
      continue;
    }
    products(k, row);
    together(k, row);
    stale(k, row);
    if (bits_of(row.dtype)) {
      not_numbers(k, row);
      ranges(k, row);
    }
    if (!strcmp(row.dtype, "fp32") || !strcmp(row.dtype, "int4")) prompt(k, row);
    if ((!strcmp(row.dtype, "fp32") || !strcmp(row.dtype, "int4")) && (!strcmp(row.strategy, "tile") || !strcmp(row.strategy, "skip"))) memory(k, row);
    ++ran;
  }
  printf("%d kernels, %d checks, %d failures\n", ran, runs, failures);
  return failures || !ran ? 1 : 0;
}
