/* The kernels' loops, written once over a Math that each isa_*.cc defines for its instruction set.

   Included inside the anonymous namespace of an isa_*.cc, and free of std::, because two files must not share an inline
   function that is compiled for different CPUs. A Math has
     value            an element as stored;  element  what is multiplied: bf16 pairs where the CPU multiplies them, else float
     Vector, Sum      registers of elements and of fp32 sums
     lanes            elements in a Vector;  sums  fp32 in a Sum;  pair = lanes / sums
     expand(bits, values, out)   writes 64 / lanes Vectors: the next values where bits are set, zeros elsewhere
     dense(values, out)          writes the same number of Vectors from 64 stored values
     load, store, splat (one pair in all sums), madd, reduce, load_sum, store_sum, zero
     to_element, to_float, from_float, narrow(sums, n, out)
     spreads              true if part() and spread() can give one Vector of a word alone
     rows_alone           true if one token's dense product reads one row after the other, not four together
     columns, rows(c)     a block of sums that fits the registers: `columns` Vectors of tokens x rows(c) rows of weights
   Shapes: T tokens, O outputs, I inputs; a panel is 4 rows of O, a word 64 of I. */

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class Math>
struct Kernels {
  using value = typename Math::value;
  using element = typename Math::element;
  using Vector = typename Math::Vector;
  using Sum = typename Math::Sum;
  static constexpr int P = SECATEURS_PANEL, WORD = SECATEURS_WORD;
  static constexpr int VECTORS = WORD / Math::lanes;
  static constexpr int PAIR = Math::lanes / Math::sums;
  static constexpr int BLOCK = Math::columns * Math::sums; /* tokens of a tile */
  static constexpr int GROUP = 6;                          /* panels that share a pass over x */
  static constexpr int SIZE = sizeof(element);
  /* elements between expanded rows: a constant, because a variable would take one register for each row */
  static constexpr int STRIDE = 8 * WORD;
  static constexpr int SLICE = 256;     /* the most inputs whose positions fit a byte */
  static constexpr int SKIP_GROUP = 16; /* panels that share a slice of x */

  static void finish(const Product& product, int64_t token, int64_t output, float sum) {
    const value* bias = static_cast<const value*>(product.bias);
    if (bias) sum += Math::to_float(bias[output]);
    static_cast<value*>(product.y)[token * product.weight.outputs + output] = Math::from_float(sum);
  }

  /* ------------------------------------------------------------------------------------------------ x for streams */

  static bool as_it_is(const Call& call) { return Math::element_is_value && call.inputs % WORD == 0; }
  static int64_t rows_bytes(const Call& call) {
    return as_it_is(call) ? 0 : call.tokens * call.words * WORD * static_cast<int64_t>(sizeof(element));
  }
  static int64_t rows_pieces(const Call& call) { return call.tokens; }
  static void rows_prepare(const Call& call, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const value* from = static_cast<const value*>(call.x) + t * call.inputs;
      element* to = static_cast<element*>(call.packed) + t * call.words * WORD;
      for (int64_t i = 0; i < call.inputs; ++i) to[i] = Math::to_element(from[i]);
      for (int64_t i = call.inputs; i < call.words * WORD; ++i) to[i] = element();
    }
  }
  static const element* rows(const Call& call) {
    return static_cast<const element*>(call.packed ? call.packed : const_cast<void*>(call.x));
  }

  /* ------------------------------------------------------------------------------------------------------- stream */

  /* The survivors of 4 rows lie in one stream, so that one load of x serves 4 rows. */
  template <int TOKENS>
  static void stream_panel(const Call& call, const Product& product, int64_t panel, int64_t token) {
    const secateurs_weight& w = product.weight;
    const int64_t words = call.words;
    const element* x = rows(call) + token * words * WORD;
    const value* values = static_cast<const value*>(w.values) + w.starts[panel];
    const uint64_t* mask = w.mask + panel * words * P;
    /* with one token there are registers for two sums a row, which hides the latency of an addition */
    constexpr int SUMS = TOKENS == 1 ? 2 : 1;
    Sum sum[P][TOKENS][SUMS];
    for (int r = 0; r < P; ++r)
      for (int t = 0; t < TOKENS; ++t)
        for (int s = 0; s < SUMS; ++s) sum[r][t][s] = Math::zero();
    for (int64_t j = 0; j < words; ++j) {
      /* prefetch a page ahead, as many bytes as half of the weights take: hardware prefetching stops at the end of a page */
#pragma GCC unroll 8
      for (int line = 0; line < 2 * static_cast<int>(sizeof(value)); ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(values) + 4096 + 64 * line);
      __builtin_prefetch(reinterpret_cast<const char*>(mask) + 1024);
#pragma GCC unroll 4
      for (int r = 0; r < P; ++r) {
        Vector row[VECTORS];
        const uint64_t bits = *mask++;
        Math::expand(bits, values, row);
        values += __builtin_popcountll(bits);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) {
            Sum& s = sum[r][t][v % SUMS];
            s = Math::madd(s, row[v], Math::load(x + (t * words + j) * WORD + v * Math::lanes));
          }
      }
    }
    /* all rows, also unused ones: a loop of unknown length would move the sums from registers to memory */
    float total[P][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < P; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t)
        total[r][t] = Math::reduce(SUMS == 2 ? Math::plus(sum[r][t][0], sum[r][t][SUMS - 1]) : sum[r][t][0]);
    for (int r = 0; r < P && panel * P + r < w.outputs; ++r)
      for (int t = 0; t < TOKENS; ++t) finish(product, token + t, panel * P + r, total[r][t]);
  }

  /* The same with the loops over rows and Vectors exchanged, for Maths that can find a Vector's survivors cheaply: one load of x
     serves 4 rows. EACH: the number of survivors in every byte of the panel's mask, if it is the same everywhere; else 0. */
  template <int TOKENS, int EACH>
  static void spread_panel(const Call& call, const Product& product, int64_t panel, int64_t token) {
    const secateurs_weight& w = product.weight;
    const int64_t words = call.words;
    const element* x = rows(call) + token * words * WORD;
    const value* values = static_cast<const value*>(w.values) + w.starts[panel];
    const uint64_t* mask = w.mask + panel * words * P;
    Sum sum[P][TOKENS];
    for (int r = 0; r < P; ++r)
      for (int t = 0; t < TOKENS; ++t) sum[r][t] = Math::zero();
    for (int64_t j = 0; j < words; ++j, mask += P, x += WORD) {
#pragma GCC unroll 8
      for (int line = 0; line < 2 * static_cast<int>(sizeof(value)); ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(values) + 2048 + 64 * line);
      __builtin_prefetch(reinterpret_cast<const char*>(mask) + 1024);
      const value* at[P] = {values};
#pragma GCC unroll 4
      for (int r = 1; r < P; ++r) at[r] = at[r - 1] + (EACH ? 8 * EACH : __builtin_popcountll(mask[r - 1]));
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        Vector column[TOKENS];
        for (int t = 0; t < TOKENS; ++t) column[t] = Math::load(x + t * words * WORD + v * Math::lanes);
#pragma GCC unroll 4
        for (int r = 0; r < P; ++r) {
          const uint64_t part = Math::part(mask[r], v);
          const Vector row = Math::spread(part, at[r] + EACH * v);
          if (!EACH) at[r] += __builtin_popcountll(part);
          for (int t = 0; t < TOKENS; ++t) sum[r][t] = Math::madd(sum[r][t], row, column[t]);
        }
      }
      values = EACH ? values + 8 * EACH * P : at[P - 1];
    }
    float total[P][TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < P; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) total[r][t] = Math::reduce(sum[r][t]);
    for (int r = 0; r < P && panel * P + r < w.outputs; ++r)
      for (int t = 0; t < TOKENS; ++t) finish(product, token + t, panel * P + r, total[r][t]);
  }

  template <int EACH>
  static void spread_tokens(const Call& call, const Product& product, int64_t panel) {
    int64_t t = 0;
    for (; t + 3 <= call.tokens; t += 3) spread_panel<3, EACH>(call, product, panel, t);
    if (t + 2 == call.tokens) spread_panel<2, EACH>(call, product, panel, t);
    if (t + 1 == call.tokens) spread_panel<1, EACH>(call, product, panel, t);
  }

  static void stream(const Call& call, const Product& product, int64_t begin, int64_t end, void*) {
    const secateurs_weight& w = product.weight;
    for (int64_t p = begin; p < end; ++p) {
      if constexpr (Math::spreads) {
        /* no byte has more than `most` survivors, so a panel whose bytes have that many on average has exactly that many in each */
        const bool even = w.starts[p + 1] - w.starts[p] == w.most * (WORD / 8) * P * call.words;
        if (even && w.most == 4)
          spread_tokens<4>(call, product, p);
        else if (even && w.most == 2)
          spread_tokens<2>(call, product, p);
        else
          spread_tokens<0>(call, product, p);
      } else {
        int64_t t = 0;
        for (; Math::columns >= 4 && t + 4 <= call.tokens; t += 4) stream_panel<4>(call, product, p, t);
        for (; t + 2 <= call.tokens; t += 2) stream_panel<2>(call, product, p, t);
        for (; t < call.tokens; ++t) stream_panel<1>(call, product, p, t);
      }
    }
  }

  /* ------------------------------------------------------------------------------------------------------- gather */

  /* Few tokens, work in proportion to the survivors: x is fetched at the positions that secateurs_fill_steps listed. The lower
     half of a step's products belongs to the next survivors of the four rows, the upper half to the survivors after them. */
  template <int TOKENS>
  static void gather_panel(const Call& call, const Product& product, int64_t panel, int64_t token) {
    const secateurs_weight& w = product.weight;
    const int64_t wide = call.words * WORD, steps = w.step_starts[panel + 1] - w.step_starts[panel];
    constexpr int64_t STEP = 2 * P * (1 + static_cast<int64_t>(sizeof(value)));
    const char* at = static_cast<const char*>(w.steps) + w.step_starts[panel] * STEP;
    const element* x = rows(call) + token * wide;
    Sum sum[TOKENS];
    for (int t = 0; t < TOKENS; ++t) sum[t] = Math::zero();
    /* the positions of AHEAD steps are computed first: a load that follows a wider store at once would wait for it */
    constexpr int AHEAD = 16;
    typename Math::Places places = {};
    uint16_t inputs[AHEAD][2 * P];
    for (int64_t s = 0; s < steps; s += AHEAD) {
      const int some = static_cast<int>(least(AHEAD, steps - s));
      for (int i = 0; i < some; ++i) places.advance(at + i * STEP, inputs[i]);
      for (int i = 0; i < some; ++i, at += STEP) {
        __builtin_prefetch(at + 2048);
        const Vector row = Math::listed(at + 2 * P);
        for (int t = 0; t < TOKENS; ++t) sum[t] = Math::madd(sum[t], row, Math::fetch(x + t * wide, inputs[i]));
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      float total[2 * P];
      Math::store_sum(total, sum[t]);
      for (int r = 0; r < P && panel * P + r < w.outputs; ++r) finish(product, token + t, panel * P + r, total[r] + total[P + r]);
    }
  }

  static void gather_stream(const Call& call, const Product& product, int64_t begin, int64_t end, void*) {
    for (int64_t p = begin; p < end; ++p) {
      int64_t t = 0;
      for (; t + 4 <= call.tokens; t += 4) gather_panel<4>(call, product, p, t);
      if (call.tokens - t == 3) gather_panel<3>(call, product, p, t);
      if (call.tokens - t == 2) gather_panel<2>(call, product, p, t);
      if (call.tokens - t == 1) gather_panel<1>(call, product, p, t);
    }
  }

  template <int ROWS, int TOKENS>
  static void dense_rows(const Call& call, const Product& product, int64_t output, int64_t token) {
    const element* x = rows(call) + token * call.words * WORD;
    const value* weight = static_cast<const value*>(product.weight.values) + output * call.inputs;
    constexpr int SUMS = TOKENS > 1 ? 1 : Math::rows_alone && ROWS == 1 ? 4 : 2;
    Sum sum[ROWS][TOKENS][SUMS];
    for (int r = 0; r < ROWS; ++r)
      for (int t = 0; t < TOKENS; ++t)
        for (int s = 0; s < SUMS; ++s) sum[r][t][s] = Math::zero();
    const auto word = [&](const value* from, int64_t step, int64_t j) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        Vector row[VECTORS];
        Math::dense(from + r * step, row);
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) {
            Sum& s = sum[r][t][v % SUMS];
            s = Math::madd(s, row[v], Math::load(x + (t * call.words + j) * WORD + v * Math::lanes));
          }
      }
    };
    const int64_t whole = call.inputs / WORD, left = call.inputs % WORD;
    for (int64_t j = 0; j < whole; ++j) word(weight + j * WORD, call.inputs, j);
    if (left) {
      /* the last word of a row is short: it is copied and filled up with zeros */
      value rest[ROWS * WORD] = {};
      for (int r = 0; r < ROWS; ++r)
        for (int64_t i = 0; i < left; ++i) rest[r * WORD + i] = weight[r * call.inputs + whole * WORD + i];
      word(rest, WORD, whole);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        Sum all = sum[r][t][0];
#pragma GCC unroll 4
        for (int s = 1; s < SUMS; ++s) all = Math::plus(all, sum[r][t][s]);
        finish(product, token + t, output + r, Math::reduce(all));
      }
  }

  template <int ROWS>
  static void dense_tokens(const Call& call, const Product& product, int64_t output) {
    int64_t t = 0;
    for (; Math::columns >= 4 && t + 4 <= call.tokens; t += 4) dense_rows<ROWS, 4>(call, product, output, t);
    for (; t + 2 <= call.tokens; t += 2) dense_rows<ROWS, 2>(call, product, output, t);
    for (; t < call.tokens; ++t) dense_rows<ROWS, 1>(call, product, output, t);
  }

  static void dense_stream(const Call& call, const Product& product, int64_t begin, int64_t end, void*) {
    for (int64_t p = begin; p < end; ++p) {
      const bool alone = Math::rows_alone && call.tokens == 1;
      if (!alone && (p + 1) * P <= product.weight.outputs)
        dense_tokens<P>(call, product, p * P);
      else
        for (int64_t o = p * P; o < least(p * P + P, product.weight.outputs); ++o) dense_tokens<1>(call, product, o);
    }
  }

  /* -------------------------------------------------------------------------------------------------- x for tiles */

  /* packed[block][input / PAIR][token of block][PAIR]; zeros after the last input, and tokens in whole registers */
  static int64_t width(const Call& call) { return least(BLOCK, ceil_div(call.tokens, Math::sums) * Math::sums); }
  static int64_t blocks(const Call& call) { return ceil_div(call.tokens, width(call)); }
  static int64_t columns_of(const Call& call, int64_t block) {
    return ceil_div(least(width(call), call.tokens - block * width(call)), Math::sums);
  }
  static int64_t tile_bytes(const Call& call) { return blocks(call) * call.words * WORD * width(call) * SIZE; }
  static int64_t tile_pieces(const Call& call) { return blocks(call) * call.words; }
  static void tile_prepare(const Call& call, int64_t begin, int64_t end) {
    struct Unit {
      element of[PAIR];
    };
    const int64_t wide = width(call);
    const value* x = static_cast<const value*>(call.x);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t block = piece / call.words, j = piece % call.words;
      const int64_t first = block * wide, tokens = least(wide, call.tokens - first);
      const int64_t inputs = least(WORD, call.inputs - j * WORD);
      Unit* to = static_cast<Unit*>(call.packed) + piece * (WORD / PAIR) * wide;
      for (int64_t t = 0; t < columns_of(call, block) * Math::sums; ++t) {
        element line[WORD] = {};
        if (t < tokens)
          for (int64_t i = 0; i < inputs; ++i) line[i] = Math::to_element(x[(first + t) * call.inputs + j * WORD + i]);
        for (int64_t i = 0; i < WORD / PAIR; ++i) __builtin_memcpy(to[i * wide + t].of, line + i * PAIR, sizeof(Unit));
      }
    }
  }

  /* --------------------------------------------------------------------------------------------------------- tile */

  /* words in a tile: their part of x, for one block of tokens, takes 32 KiB of the first cache */
  static int64_t tile_depth(const Call& call) {
    const int64_t depth = 32768 / (WORD * SIZE * width(call));
    return depth < 1 ? 1 : least(depth, STRIDE / WORD);
  }

  /* scratch: sums of GROUP panels x all tokens, then the expanded rows of GROUP panels x one tile */
  static int64_t sums_stride(const Call& call) { return blocks(call) * width(call); }
  static int64_t tile_scratch(const Call& call) {
    return GROUP * P * (sums_stride(call) * static_cast<int64_t>(sizeof(float)) + STRIDE * SIZE);
  }

  /* Prefetches what the next group of panels will read, a line at a time between products. Else memory would be idle while
     products are formed, and the CPU while memory is read. A slice is what one call of multiply() prefetches. */
  struct Ahead {
    const char* at[2];
    const char* end[2];
    const char* stop; /* of the slice */
    int64_t step;
    Ahead(const Call& call, const secateurs_weight& w, int64_t begin, int64_t last, int64_t panels, int64_t calls) {
      const int64_t from = least(begin, last), to = least(begin + panels, last);
      const value* values = static_cast<const value*>(w.values);
      const auto start = [&](int64_t p) { return w.mask ? w.starts[p] : least(p * P, w.outputs) * w.inputs; };
      at[0] = reinterpret_cast<const char*>(values + start(from));
      end[0] = reinterpret_cast<const char*>(values + start(to));
      at[1] = w.mask ? reinterpret_cast<const char*>(w.mask + from * call.words * P) : end[0];
      end[1] = w.mask ? reinterpret_cast<const char*>(w.mask + to * call.words * P) : end[0];
      step = (ceil_div(end[0] - at[0] + end[1] - at[1], calls) + 127) / 64 * 64;
    }
    const char* next() {
      const int part = at[0] < end[0] ? 0 : 1;
      const char* from = at[part];
      stop = end[part] - from < step ? end[part] : from + step;
      at[part] = stop;
      return from;
    }
  };

  /* ROWS rows x COLUMNS registers of tokens += expanded weights (ROWS x inputs) * x */
  template <int ROWS, int COLUMNS>
  static void multiply(const element* weight, int64_t inputs, const element* x, int64_t wide, float* sums, int64_t stride,
                       Ahead& ahead) {
    Sum sum[ROWS][COLUMNS];
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Math::load_sum(sums + r * stride + c * Math::sums);
    const char* next = ahead.next();
    for (int64_t i = 0; i < inputs; i += PAIR) {
      if (next < ahead.stop) __builtin_prefetch(next, 0, 2);
      next += 64;
      Vector column[COLUMNS];
#pragma GCC unroll 4
      for (int c = 0; c < COLUMNS; ++c) column[c] = Math::load(x + i * wide + c * Math::lanes);
#pragma GCC unroll 32
      for (int r = 0; r < ROWS; ++r) {
        const Vector one = Math::splat(weight + r * STRIDE + i);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Math::madd(sum[r][c], one, column[c]);
      }
    }
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) Math::store_sum(sums + r * stride + c * Math::sums, sum[r][c]);
  }

  template <int COLUMNS>
  static void multiply_rows(const element* weight, int64_t rows, int64_t inputs, const element* x, int64_t wide, float* sums,
                            int64_t stride, Ahead& ahead) {
    constexpr int R = Math::rows(COLUMNS);
    int64_t r = 0;
    for (; r + R <= rows; r += R) multiply<R, COLUMNS>(weight + r * STRIDE, inputs, x, wide, sums + r * stride, stride, ahead);
    for (; r < rows; r += 2) multiply<2, COLUMNS>(weight + r * STRIDE, inputs, x, wide, sums + r * stride, stride, ahead);
  }

  static void multiply_block(const element* weight, int64_t rows, int64_t inputs, const element* x, int64_t wide, float* sums,
                             int64_t stride, int64_t columns, Ahead& ahead) {
    if (columns == 1)
      multiply_rows<1>(weight, rows, inputs, x, wide, sums, stride, ahead);
    else if (columns == 2)
      multiply_rows<2>(weight, rows, inputs, x, wide, sums, stride, ahead);
    else if (columns == 3)
      multiply_rows<3>(weight, rows, inputs, x, wide, sums, stride, ahead);
    else
      multiply_rows<Math::columns>(weight, rows, inputs, x, wide, sums, stride, ahead);
  }

  static void write_sums(const Call& call, const Product& product, int64_t first, int64_t rows, const float* sums,
                         int64_t stride) {
    const value* bias = static_cast<const value*>(product.bias);
    for (int64_t t = 0; t < call.tokens; ++t) {
      float line[SKIP_GROUP * P + 16];
      for (int64_t r = 0; r < rows; ++r) line[r] = sums[r * stride + t];
      if (bias)
        for (int64_t r = 0; r < rows; ++r) line[r] += Math::to_float(bias[first + r]);
      Math::narrow(line, rows, static_cast<value*>(product.y) + t * product.weight.outputs + first);
    }
  }

  /* Expands `depth` words of a panel, with zeros where no weight is stored. values: the next survivors; returns those after. */
  static const value* expand_panel(const uint64_t* mask, const value* values, int64_t depth, element* expanded) {
    for (int64_t j = 0; j < depth; ++j)
#pragma GCC unroll 4
      for (int r = 0; r < P; ++r) {
        Vector row[VECTORS];
        const uint64_t bits = *mask++;
        Math::expand(bits, values, row);
        values += __builtin_popcountll(bits);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) Math::store(expanded + r * STRIDE + j * WORD + v * Math::lanes, row[v]);
      }
    return values;
  }
  static void widen_panel(const Call& call, const secateurs_weight& w, int64_t panel, int64_t deep, int64_t depth, element* expanded) {
    for (int64_t o = panel * P; o < panel * P + P; ++o, expanded += STRIDE) {
      const value* from = static_cast<const value*>(w.values) + o * w.inputs + deep * WORD;
      const int64_t inputs = o < w.outputs ? least(depth * WORD, call.inputs - deep * WORD) : 0;
      int64_t i = 0;
      for (; i + WORD <= inputs; i += WORD) {
        Vector row[VECTORS];
        Math::dense(from + i, row);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) Math::store(expanded + i + v * Math::lanes, row[v]);
      }
      for (; i < inputs; ++i) expanded[i] = Math::to_element(from[i]);
      for (; i < depth * WORD; ++i) expanded[i] = element();
    }
  }

  template <bool DENSE>
  static void tile(const Call& call, const Product& product, int64_t begin, int64_t end, void* scratch) {
    const secateurs_weight& w = product.weight;
    const int64_t words = call.words, stride = sums_stride(call), wide = width(call);
    float* sums = static_cast<float*>(scratch);
    element* expanded = reinterpret_cast<element*>(sums + GROUP * P * stride);
    for (int64_t group = begin; group < end; group += GROUP) {
      const int64_t panels = least(GROUP, end - group);
      const value* values[GROUP];
      for (int64_t p = 0; !DENSE && p < panels; ++p) values[p] = static_cast<const value*>(w.values) + w.starts[group + p];
      const int64_t calls = ceil_div(words, tile_depth(call)) * blocks(call) * (GROUP * P / Math::rows(columns_of(call, 0)));
      Ahead ahead(call, w, group + GROUP, end, GROUP, calls);
      for (int64_t i = 0; i < panels * P * stride; ++i) sums[i] = 0;
      for (int64_t deep = 0; deep < words; deep += tile_depth(call)) {
        const int64_t depth = least(tile_depth(call), words - deep);
        for (int64_t p = 0; p < panels; ++p) {
          element* to = expanded + p * P * STRIDE;
          if constexpr (DENSE)
            widen_panel(call, w, group + p, deep, depth, to);
          else
            values[p] = expand_panel(w.mask + ((group + p) * words + deep) * P, values[p], depth, to);
        }
        for (int64_t block = 0; block < blocks(call); ++block) {
          const element* x = static_cast<const element*>(call.packed) + (block * words + deep) * WORD * wide;
          multiply_block(expanded, panels * P, depth * WORD, x, wide, sums + block * wide, stride, columns_of(call, block), ahead);
        }
      }
      const int64_t first = group * P;
      write_sums(call, product, first, least(panels * P, w.outputs - first), sums, stride);
    }
  }

  /* --------------------------------------------------------------------------------------------------------- skip */

  /* Work in proportion to the survivors. A slice of x stays in the cache while SKIP_GROUP panels use it: their survivors in the
     slice are listed row by row, and each adds its multiple of a column of x. The four rows of a panel are done together, with
     shorter lists filled up with zeros, so that sums stay in registers and one loop end is mispredicted instead of four. All blocks
     of tokens use the same lists. scratch: the group's lists, then its sums for all tokens. For Maths whose element is a float. */
  struct Lists {
    static constexpr int FILL = 32;
    float kept[P][SLICE + WORD];
    uint8_t positions[P][SLICE + WORD]; /* in the slice */
    int64_t count;                      /* of the longest */

    const value* fill(const uint64_t* mask, const value* values, int64_t depth) {
      int64_t n[P] = {};
      for (int64_t j = 0; j < depth; ++j)
#pragma GCC unroll 4
        for (int r = 0; r < P; ++r) {
          const uint64_t bits = *mask++;
          const int survivors = __builtin_popcountll(bits);
          Math::positions(bits, static_cast<uint8_t>(j * WORD), positions[r] + n[r]);
          Math::widen(values, survivors, kept[r] + n[r]);
          values += survivors;
          n[r] += survivors;
        }
      count = 0;
      for (int r = 0; r < P; ++r) count = n[r] > count ? n[r] : count;
      for (int r = 0; r < P; ++r)
        for (int64_t i = n[r]; i < count; i += FILL) {
          /* in blocks of FILL, so that this loop nearly always runs once */
          __builtin_memset(kept[r] + i, 0, FILL * sizeof(float));
          __builtin_memset(positions[r] + i, 0, FILL);
        }
      return values;
    }
  };

  static int64_t skip_scratch(const Call& call) {
    return SKIP_GROUP * (static_cast<int64_t>(sizeof(Lists)) + P * 4 * sums_stride(call));
  }


  template <int COLUMNS>
  static void gather(const Lists& lists, const element* x, int64_t wide, float* sums, int64_t stride) {
    Sum sum[P][COLUMNS];
    for (int r = 0; r < P; ++r)
      for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Math::load_sum(sums + r * stride + c * Math::sums);
    for (int64_t i = 0; i < lists.count; ++i)
#pragma GCC unroll 4
      for (int r = 0; r < P; ++r) {
        const element* column = x + lists.positions[r][i] * wide;
        const Vector one = Math::splat(lists.kept[r] + i);
#pragma GCC unroll 4
        for (int c = 0; c < COLUMNS; ++c) sum[r][c] = Math::madd(sum[r][c], one, Math::load(column + c * Math::lanes));
      }
    for (int r = 0; r < P; ++r)
      for (int c = 0; c < COLUMNS; ++c) Math::store_sum(sums + r * stride + c * Math::sums, sum[r][c]);
  }

  static void skip(const Call& call, const Product& product, int64_t begin, int64_t end, void* scratch) {
    const secateurs_weight& w = product.weight;
    const int64_t words = call.words, stride = sums_stride(call), wide = width(call), depth = SLICE / WORD;
    Lists* lists = static_cast<Lists*>(scratch);
    float* sums = reinterpret_cast<float*>(lists + SKIP_GROUP);
    for (int64_t group = begin; group < end; group += SKIP_GROUP) {
      const int64_t panels = least(SKIP_GROUP, end - group);
      for (int64_t i = 0; i < panels * P * stride; ++i) sums[i] = 0;
      Ahead ahead(call, w, group + SKIP_GROUP, end, SKIP_GROUP, blocks(call) * SKIP_GROUP * ceil_div(words, depth));
      const value* values[SKIP_GROUP];
      for (int64_t p = 0; p < panels; ++p) values[p] = static_cast<const value*>(w.values) + w.starts[group + p];
      for (int64_t deep = 0; deep < words; deep += depth) {
        const auto fill = [&](int64_t p, Lists& to) {
          values[p] = to.fill(w.mask + ((group + p) * words + deep) * P, values[p], least(depth, words - deep));
        };
        /* with one block of tokens each list is used once, while it is still in the first cache */
        const bool once = blocks(call) == 1;
        for (int64_t p = 0; !once && p < panels; ++p) fill(p, lists[p]);
        for (int64_t block = 0; block < blocks(call); ++block) {
          const int64_t columns = columns_of(call, block);
          const element* x = static_cast<const element*>(call.packed) + (block * words + deep) * WORD * wide;
          for (int64_t p = 0; p < panels; ++p) {
            for (const char* next = ahead.next(); next < ahead.stop; next += 64) __builtin_prefetch(next, 0, 2);
            if (once) fill(p, lists[0]);
            const Lists& list = lists[once ? 0 : p];
            float* to = sums + p * P * stride + block * wide;
            if (columns == 1)
              gather<1>(list, x, wide, to, stride);
            else if (columns == 2)
              gather<2>(list, x, wide, to, stride);
            else if (columns == 3)
              gather<3>(list, x, wide, to, stride);
            else
              gather<Math::columns>(list, x, wide, to, stride);
          }
        }
      }
      write_sums(call, product, group * P, least(panels * P, w.outputs - group * P), sums, stride);
    }
  }

  static int64_t none(const Call&) { return 0; }

  static double spin(int64_t rounds) {
    element ones[Math::lanes];
    for (int i = 0; i < Math::lanes; ++i) ones[i] = element();
    const Vector a = Math::load(ones);
    Sum sum[16];
    for (int s = 0; s < 16; ++s) sum[s] = Math::zero();
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 32
      for (int s = 0; s < 16; ++s) {
        sum[s] = Math::madd(sum[s], a, a);
        Math::keep(sum[s]);
      }
    }
    return 2.0 * 16 * Math::lanes * static_cast<double>(rounds);
  }
};

#define SECATEURS_STREAM(name, Math)                                                                            \
  const KernelBody name = {Kernels<Math>::rows_bytes, Kernels<Math>::rows_pieces, Kernels<Math>::rows_prepare, \
                           Kernels<Math>::none, Kernels<Math>::stream, Kernels<Math>::spin};
#define SECATEURS_TILE(name, Math)                                                                              \
  const KernelBody name = {Kernels<Math>::tile_bytes, Kernels<Math>::tile_pieces, Kernels<Math>::tile_prepare, \
                           Kernels<Math>::tile_scratch, Kernels<Math>::tile<false>, Kernels<Math>::spin};
#define SECATEURS_SKIP(name, Math)                                                                              \
  const KernelBody name = {Kernels<Math>::tile_bytes, Kernels<Math>::tile_pieces, Kernels<Math>::tile_prepare, \
                           Kernels<Math>::skip_scratch, Kernels<Math>::skip, Kernels<Math>::spin};
#define SECATEURS_DENSE(name, Math)                                                                             \
  const KernelBody name = {Kernels<Math>::rows_bytes, Kernels<Math>::rows_pieces, Kernels<Math>::rows_prepare, \
                           Kernels<Math>::none, Kernels<Math>::dense_stream, Kernels<Math>::spin};
#define SECATEURS_GATHER(name, Math)                                                                            \
  const KernelBody name = {Kernels<Math>::rows_bytes, Kernels<Math>::rows_pieces, Kernels<Math>::rows_prepare, \
                           Kernels<Math>::none, Kernels<Math>::gather_stream, Kernels<Math>::spin};
#define SECATEURS_DENSE_TILE(name, Math)                                                                        \
  const KernelBody name = {Kernels<Math>::tile_bytes, Kernels<Math>::tile_pieces, Kernels<Math>::tile_prepare, \
                           Kernels<Math>::tile_scratch, Kernels<Math>::tile<true>, Kernels<Math>::spin};
