/* The table of kernels, which of them this CPU can run, and one product split over threads. */
#include <string.h>

#include "kernel.h"
#include "pool.h"

namespace {

struct Row {
  const char* name;
  const char* format;
  const char* dtype;
  const char* isa;
  const char* strategy;
  const KernelBody* body;
};

#define KERNEL(format, dtype, isa, strategy) \
  {#format "_" #dtype "_" #isa "_" #strategy, #format, #dtype, #isa, #strategy, &format##_##dtype##_##isa##_##strategy},
const Row ROWS[] = {
#include "kernels.inc"
};
#undef KERNEL
const char* const DTYPES[] = {"bf16", "fp16", "fp32"};
constexpr int32_t COUNT = sizeof(ROWS) / sizeof(ROWS[0]);

bool runnable(const char* isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("bmi2");
  if (!strcmp(isa, "avx2"))
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
#endif
  return !strcmp(isa, "scalar") || !strcmp(isa, "neon");
}

secateurs_parallel_for threads_of_torch = nullptr;

thread_local Kept packed_x, scratch;

/* About as many bytes of each are kept as this: a longer prompt is multiplied in pieces, which read all weights each, for hundreds
   of tokens. */
constexpr int64_t MOST_KEPT = 32 << 20;
/* the tokens of a piece are whole blocks for every instruction set: of 64, 24, 16 or 4 tokens */
enum { WHOLE_BLOCKS = 192 };

struct Work {
  const KernelBody* body;
  const secateurs_product* products;
  int32_t count;
  int64_t itemsize; /* of x and y */
  Call call;
  char* y;
  int64_t tokens; /* of all pieces; call.tokens are those of one */
  int64_t first;  /* the piece's first token */
  int64_t pieces; /* of x */
  int64_t parts;  /* of the work */
  double total;
  int32_t failed;
};

int64_t panels(const secateurs_weight& w) { return (w.outputs + SECATEURS_PANEL - 1) / SECATEURS_PANEL; }

int64_t groups(const secateurs_weight& w) { return w.group ? (w.inputs + w.group - 1) / w.group : 1; }
/* bytes that the integers of so many survivors take */
int64_t run_bytes(int64_t survivors, int32_t bits) { return (survivors * bits + 7) / 8; }

/* bytes of the panels before `panel`: the measure by which work is split */
double cost(const Work& work, const secateurs_weight& w, int64_t panel) {
  const int64_t words = panel * work.call.words * SECATEURS_PANEL, mask = w.mask ? 8 * words : 0;
  if (w.bits) {
    const int64_t values = w.mask ? w.starts[panel] - w.starts[0] : words * run_bytes(SECATEURS_WORD, w.bits);
    return static_cast<double>(values + mask + panel * groups(w) * SECATEURS_PANEL * (w.zero ? 3 : 2));
  }
  const int64_t values = w.mask ? w.starts[panel] - w.starts[0] : panel * SECATEURS_PANEL * w.inputs;
  return static_cast<double>(values * work.itemsize + mask);
}

/* the first panel with at least `share` bytes before it */
int64_t boundary(const Work& work, const secateurs_weight& w, double share) {
  int64_t low = 0, high = panels(w);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(work, w, middle) < share)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

void prepare_part(int64_t begin, int64_t end, void* context) {
  Work& work = *static_cast<Work*>(context);
  for (int64_t part = begin; part < end; ++part)
    work.body->prepare(work.call, work.pieces * part / work.parts, work.pieces * (part + 1) / work.parts);
}

void run_part(int64_t begin, int64_t end, void* context) {
  Work& work = *static_cast<Work*>(context);
  const int64_t nbytes = work.body->scratch_bytes(work.call);
  void* memory = nbytes ? scratch.get(nbytes) : nullptr;
  if (nbytes && !memory) {
    __atomic_store_n(&work.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t part = begin; part < end; ++part) {
    const double from = work.total * static_cast<double>(part) / static_cast<double>(work.parts);
    const double to = work.total * static_cast<double>(part + 1) / static_cast<double>(work.parts);
    double before = 0;
    char* y = work.y;
    for (int32_t p = 0; p < work.count; ++p) {
      const secateurs_weight& w = work.products[p].weight;
      const int64_t first = boundary(work, w, from - before);
      const int64_t last = part + 1 == work.parts ? panels(w) : boundary(work, w, to - before);
      char* at = y + work.first * w.outputs * work.itemsize;
      if (first < last) work.body->run(work.call, {w, work.products[p].bias, at}, first, last, memory);
      before += cost(work, w, panels(w));
      y += work.tokens * w.outputs * work.itemsize;
    }
  }
}

/* multiplies a piece of x with all weights */
int32_t multiply(Work& work, int32_t threads) {
  /* waking a thread costs about as much as reading 64 KiB */
  const double useful = 1 + work.total * static_cast<double>(work.call.tokens) / 65536;
  work.parts = useful < threads ? static_cast<int64_t>(useful) : threads;
  const int64_t nbytes = work.body->packed_bytes(work.call);
  if (nbytes) {
    work.call.packed = packed_x.get(nbytes);
    if (!work.call.packed) return SECATEURS_NO_MEMORY;
    work.pieces = work.body->pieces(work.call);
    if (nbytes < 65536)
      work.body->prepare(work.call, 0, work.pieces);
    else
      parallel(work.parts, prepare_part, &work);
  }
  parallel(work.parts, run_part, &work);
  return work.failed ? SECATEURS_NO_MEMORY : SECATEURS_OK;
}

/* the byte that stands for a weight of zero there */
uint8_t zero_code(const secateurs_weight& w, int64_t row, int64_t input) {
  if (!w.zero) return static_cast<uint8_t>(1 << (w.bits - 1));
  const int64_t last = groups(w) - 1, group = w.group ? input / w.group : 0;
  const int64_t before = row / SECATEURS_PANEL * (last + 1);
  return w.zero[(before + (group < last ? group : last)) * SECATEURS_PANEL + row % SECATEURS_PANEL];
}

/* Calls fn(row, first input, bits of the mask) for each run of integers, in the order in which they are stored. */
template <class Fn>
void each_run(const secateurs_weight& w, Fn fn) {
  const uint64_t* mask = w.mask;
  for (int64_t p = 0; p < panels(w); ++p)
    for (int64_t input = 0; input < w.inputs; input += SECATEURS_WORD)
      for (int64_t r = 0; r < SECATEURS_PANEL; ++r) fn(p * SECATEURS_PANEL + r, input, mask ? *mask++ : ~uint64_t{0});
}

enum { STEP = 8 }; /* of the strategy `gather`: weights */

/* Calls put(slot, distance, place) for each slot of a panel's row. place: the survivor's index in values, -1 for a zero that
   fills a slot. Returns the number of slots. */
template <class Put>
int64_t row_slots(const secateurs_weight& w, int64_t panel, int64_t row, Put put) {
  const int64_t words = (w.inputs + SECATEURS_WORD - 1) / SECATEURS_WORD;
  const uint64_t* mask = w.mask + panel * words * SECATEURS_PANEL;
  int64_t at = w.starts[panel], slots = 0, before[2] = {};
  for (int64_t j = 0; j < words; ++j)
    for (int64_t r = 0; r < SECATEURS_PANEL; ++r, ++mask) {
      if (r != row) {
        at += __builtin_popcountll(*mask);
        continue;
      }
      for (uint64_t bits = *mask; bits; bits &= bits - 1) {
        const int64_t input = j * SECATEURS_WORD + __builtin_ctzll(bits);
        for (; input - before[slots % 2] > 255; ++slots) {
          put(slots, 255, -1);
          before[slots % 2] += 255;
        }
        put(slots, input - before[slots % 2], at++);
        before[slots++ % 2] = input;
      }
    }
  return slots;
}

struct Filling {
  const secateurs_weight* weight;
  int32_t itemsize;
  int64_t parts;
};

void fill_part(int64_t begin, int64_t end, void* context) {
  const Filling& filling = *static_cast<const Filling*>(context);
  const secateurs_weight& w = *filling.weight;
  const int64_t size = filling.itemsize, step = STEP * (1 + size);
  const char* values = static_cast<const char*>(w.values);
  const int64_t first = panels(w) * begin / filling.parts, last = panels(w) * end / filling.parts;
  for (int64_t p = first; p < last; ++p) {
    char* to = static_cast<char*>(const_cast<void*>(w.steps)) + w.step_starts[p] * step;
    memset(to, 0, static_cast<size_t>((w.step_starts[p + 1] - w.step_starts[p]) * step));
    for (int64_t r = 0; r < SECATEURS_PANEL; ++r)
      row_slots(w, p, r, [=](int64_t slot, int64_t distance, int64_t place) {
        char* at = to + slot / 2 * step;
        const int64_t lane = slot % 2 * SECATEURS_PANEL + r;
        at[lane] = static_cast<char>(distance);
        if (place >= 0) memcpy(at + STEP + size * lane, values + size * place, static_cast<size_t>(size));
      });
  }
}

struct Pairing {
  const secateurs_weight* weight;
  int64_t parts;
};

void pair_part(int64_t begin, int64_t end, void* context) {
  const Pairing& pairing = *static_cast<const Pairing*>(context);
  const secateurs_weight& w = *pairing.weight;
  const int64_t words = (w.inputs + SECATEURS_WORD - 1) / SECATEURS_WORD, step = 32 + 16 * w.bits;
  for (int64_t p = panels(w) * begin / pairing.parts; p < panels(w) * end / pairing.parts; ++p) {
    const uint64_t* mask = w.mask + p * words * SECATEURS_PANEL;
    const uint8_t* from = static_cast<const uint8_t*>(w.values) + w.starts[p];
    for (int64_t j = 0; j < words; ++j) {
      uint8_t* to = static_cast<uint8_t*>(const_cast<void*>(w.pairs)) + (p * words + j) * step;
      memset(to, 0, 32);
      memset(to + 32, w.bits == 8 ? 0 : 0x88, static_cast<size_t>(step - 32));
      for (int64_t r = 0; r < SECATEURS_PANEL; ++r, ++mask) {
        int64_t bit = 0, four = -1, place = 0;
        for (uint64_t kept = *mask; kept; kept &= kept - 1, bit += w.bits) {
          const int64_t i = __builtin_ctzll(kept), k = i % 32 / 8;
          place = i / 4 == four ? 1 : 0;
          four = i / 4;
          const int64_t lane = i / 32 * 16 + r * 4 + four % 2 * 2 + place;
          to[lane] = static_cast<uint8_t>(to[lane] | i % 4 << 2 * k);
          if (w.bits == 8) {
            to[32 + 32 * k + lane] = static_cast<uint8_t>(from[bit / 8] ^ 0x80);
          } else {
            uint8_t& both = to[32 + 32 * (k / 2) + lane];
            const int code = from[bit / 8] >> bit % 8 & 15;
            both = static_cast<uint8_t>(k % 2 ? (both & 15) | code << 4 : (both & 0xf0) | code);
          }
        }
        from += (bit + 7) / 8;
      }
    }
  }
}

struct Reading {
  const char* buffer;
  int64_t nbytes;
  int64_t parts;
  uint64_t sum;
};

void read_part(int64_t begin, int64_t end, void* context) {
  Reading& reading = *static_cast<Reading*>(context);
  const int64_t words = reading.nbytes / 8;
  for (int64_t part = begin; part < end; ++part) {
    const uint64_t* at = reinterpret_cast<const uint64_t*>(reading.buffer);
    const int64_t last = words * (part + 1) / reading.parts;
    uint64_t sums[16] = {};
    int64_t i = words * part / reading.parts;
    for (; i + 16 <= last; i += 16)
      for (int s = 0; s < 16; ++s) sums[s] ^= at[i + s];
    for (int s = 1; s < 16; ++s) sums[0] ^= sums[s];
    __atomic_fetch_xor(&reading.sum, sums[0], __ATOMIC_RELAXED);
  }
}

/* more threads than this are not used */
enum { MOST_THREADS = 1024 };

struct Spinning {
  const KernelBody* body;
  int64_t rounds;
  double flops[MOST_THREADS];
};

void spin_part(int64_t begin, int64_t end, void* context) {
  Spinning& spinning = *static_cast<Spinning*>(context);
  for (int64_t part = begin; part < end; ++part) spinning.flops[part] = spinning.body->spin(spinning.rounds);
}

}  // namespace

void parallel(int64_t pieces, secateurs_range fn, void* context) {
  if (pieces > 1 && threads_of_torch && threads_of_torch(0, pieces, 1, fn, context) == 0) return;
  fn(0, pieces, context);
}

const BlockBody* block_body(int32_t kernel) {
  const struct {
    const char* isa;
    const BlockBody* body;
  } all[] = {
#if defined(__x86_64__)
      {"avx512", &block_avx512}, {"avx2", &block_avx2},
#endif
#if defined(__aarch64__)
      {"neon", &block_neon},
#endif
      {"scalar", &block_scalar},
  };
  if (kernel < 0 || kernel >= COUNT) return nullptr;
  for (const auto& one : all)
    if (!strcmp(one.isa, ROWS[kernel].isa)) return one.body;
  return nullptr;
}

extern "C" {

int32_t secateurs_abi(void) { return SECATEURS_ABI; }

int32_t secateurs_kernels(void) { return COUNT; }

int32_t secateurs_kernel_info(int32_t kernel, secateurs_kernel* out) {
  if (kernel < 0 || kernel >= COUNT) return SECATEURS_BAD_KERNEL;
  const Row& row = ROWS[kernel];
  *out = {row.name, row.format, row.dtype, row.isa, row.strategy, runnable(row.isa)};
  return SECATEURS_OK;
}

void secateurs_use_threads(secateurs_parallel_for parallel_for) { threads_of_torch = parallel_for; }

int32_t secateurs_linear(int32_t kernel, const secateurs_product* products, int32_t count, const void* x, void* y,
                         int32_t dtype, int64_t tokens, int32_t threads) {
  if (kernel < 0 || kernel >= COUNT) return SECATEURS_BAD_KERNEL;
  if (count < 1 || tokens < 0 || threads < 1) return SECATEURS_BAD_ARGUMENT;
  if (tokens == 0) return SECATEURS_OK;
  const int64_t inputs = products[0].weight.inputs;
  const bool dense = !strcmp(ROWS[kernel].format, "dense"), gather = !strcmp(ROWS[kernel].strategy, "gather");
  const bool pairs = !strcmp(ROWS[kernel].strategy, "pairs");
  const char* stored = ROWS[kernel].dtype;
  const int32_t bits = strncmp(stored, "int", 3) ? 0 : stored[3] - '0';
  if (dtype < SECATEURS_BF16 || dtype > SECATEURS_FP32 || (!bits && strcmp(stored, DTYPES[dtype]))) return SECATEURS_BAD_ARGUMENT;
  for (int32_t p = 0; p < count; ++p) {
    const secateurs_weight& w = products[p].weight;
    if (w.inputs != inputs || dense != !w.mask || w.bits != bits || (gather && !w.step_starts) || (pairs && (!w.pairs || w.zero)))
      return SECATEURS_BAD_ARGUMENT;
    if (bits && (!w.scale || (w.group != 0 && w.group != 32 && w.group != 64 && w.group != 128))) return SECATEURS_BAD_ARGUMENT;
  }

  Work work = {};
  work.body = ROWS[kernel].body;
  work.products = products;
  work.count = count;
  work.itemsize = dtype == SECATEURS_FP32 ? 4 : 2;
  work.y = static_cast<char*>(y);
  work.tokens = tokens;
  work.call = {x, nullptr, dtype, tokens, inputs, (inputs + SECATEURS_WORD - 1) / SECATEURS_WORD};
  for (int32_t p = 0; p < count; ++p) work.total += cost(work, products[p].weight, panels(products[p].weight));

  const int64_t packed = work.body->packed_bytes(work.call), sums = work.body->scratch_bytes(work.call);
  const int64_t pieces = 1 + (packed > sums ? packed : sums) / MOST_KEPT;
  const int64_t step = pieces == 1 ? tokens : ((tokens + pieces - 1) / pieces + WHOLE_BLOCKS - 1) / WHOLE_BLOCKS * WHOLE_BLOCKS;
  for (; work.first < tokens; work.first += step) {
    work.call.x = static_cast<const char*>(x) + work.first * inputs * work.itemsize;
    work.call.tokens = tokens - work.first < step ? tokens - work.first : step;
    if (const int32_t wrong = multiply(work, threads)) return wrong;
  }
  return SECATEURS_OK;
}

int32_t secateurs_check_bitmask(const uint64_t* mask, int64_t outputs, int64_t inputs, int32_t bits, int64_t stored, int64_t* starts,
                                int64_t* where) {
  const int64_t words = (inputs + SECATEURS_WORD - 1) / SECATEURS_WORD;
  const int64_t count = (outputs + SECATEURS_PANEL - 1) / SECATEURS_PANEL;
  const int64_t last = inputs % SECATEURS_WORD;
  int64_t found = 0, survivors = 0;
  int64_t most = 0;
  uint64_t crowded = 0;
  for (int64_t p = 0; p < count; ++p) {
    starts[p] = found;
    for (int64_t j = 0; j < words; ++j)
      for (int64_t r = 0; r < SECATEURS_PANEL; ++r) {
        const uint64_t kept = *mask++;
        const int64_t row = p * SECATEURS_PANEL + r;
        where[0] = row;
        where[1] = j * SECATEURS_WORD + (kept ? __builtin_ctzll(kept) : 0);
        if (kept && row >= outputs) return 2;
        if (last && j == words - 1 && kept >> last) {
          where[1] = inputs + __builtin_ctzll(kept >> last);
          return 1;
        }
        const int64_t here = __builtin_popcountll(kept);
        survivors += here;
        found += bits ? run_bytes(here, bits) : here;
        /* the counts of each four in four bits; one more than a count of three or four has the bit for four */
        const uint64_t twos = kept - (kept >> 1 & 0x5555555555555555u);
        crowded |= ((twos & 0x3333333333333333u) + (twos >> 2 & 0x3333333333333333u) + 0x1111111111111111u) & 0x4444444444444444u;
        for (uint64_t rest = kept; rest && most < 8; rest >>= 8) {
          const int64_t in_byte = __builtin_popcountll(rest & 255);
          if (in_byte > most) most = in_byte;
        }
      }
  }
  starts[count] = found;
  where[0] = found;
  where[1] = most;
  where[2] = survivors;
  where[3] = crowded ? 0 : 1;
  return found == stored ? 0 : 3;
}

void secateurs_write_integers(const secateurs_weight* weight, const uint8_t* codes) {
  uint8_t* to = static_cast<uint8_t*>(const_cast<void*>(weight->values));
  each_run(*weight, [&](int64_t row, int64_t input, uint64_t kept) {
    uint64_t waiting = 0;
    int count = 0;
    for (; kept; kept &= kept - 1) {
      const int64_t i = input + __builtin_ctzll(kept);
      const bool inside = row < weight->outputs && i < weight->inputs;
      waiting |= static_cast<uint64_t>(inside ? codes[row * weight->inputs + i] : zero_code(*weight, row, i)) << count;
      count += weight->bits;
      for (; count >= 8; count -= 8, waiting >>= 8) *to++ = static_cast<uint8_t>(waiting);
    }
    if (count) *to++ = static_cast<uint8_t>(waiting);
  });
}

void secateurs_read_integers(const secateurs_weight* weight, uint8_t* codes) {
  const uint8_t* from = static_cast<const uint8_t*>(weight->values);
  for (int64_t row = 0; weight->mask && row < weight->outputs; ++row)
    for (int64_t i = 0; i < weight->inputs; ++i) codes[row * weight->inputs + i] = zero_code(*weight, row, i);
  each_run(*weight, [&](int64_t row, int64_t input, uint64_t kept) {
    uint64_t waiting = 0;
    int count = 0;
    for (; kept; kept &= kept - 1) {
      if (count < weight->bits) {
        waiting |= static_cast<uint64_t>(*from++) << count;
        count += 8;
      }
      const int64_t i = input + __builtin_ctzll(kept);
      if (row < weight->outputs && i < weight->inputs)
        codes[row * weight->inputs + i] = static_cast<uint8_t>(waiting & ((1u << weight->bits) - 1));
      waiting >>= weight->bits;
      count -= weight->bits;
    }
  });
}

int64_t secateurs_count_steps(const secateurs_weight* weight, int64_t* step_starts) {
  int64_t steps = 0;
  for (int64_t p = 0; p < panels(*weight); ++p) {
    int64_t longest = 0;
    for (int64_t r = 0; r < SECATEURS_PANEL; ++r) {
      const int64_t slots = row_slots(*weight, p, r, [](int64_t, int64_t, int64_t) {});
      longest = slots > longest ? slots : longest;
    }
    step_starts[p] = steps;
    steps += (longest + 1) / 2;
  }
  step_starts[panels(*weight)] = steps;
  return steps;
}

void secateurs_fill_steps(const secateurs_weight* weight, int32_t itemsize, int32_t threads) {
  Filling filling = {weight, itemsize, threads};
  parallel(threads, fill_part, &filling);
}

void secateurs_fill_pairs(const secateurs_weight* weight, int32_t threads) {
  Pairing pairing = {weight, threads};
  parallel(threads, pair_part, &pairing);
}

double secateurs_read(const void* buffer, int64_t nbytes, int32_t threads) {
  Reading reading = {static_cast<const char*>(buffer), nbytes, threads < 1 ? 1 : threads, 0};
  parallel(reading.parts, read_part, &reading);
  return static_cast<double>(reading.sum & 1);
}

double secateurs_spin(int32_t kernel, int64_t rounds, int32_t threads) {
  if (kernel < 0 || kernel >= COUNT || threads < 1) return 0;
  if (threads > MOST_THREADS) threads = MOST_THREADS;
  Spinning spinning = {ROWS[kernel].body, rounds, {}};
  parallel(threads, spin_part, &spinning);
  double flops = 0;
  for (int32_t t = 0; t < threads; ++t) flops += spinning.flops[t];
  return flops;
}

}  // extern "C"
