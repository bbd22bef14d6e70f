/* The loops of kernels whose weights are integers, written once over a Math that each isa_*.cc defines.

   x is quantized first, in blocks of 32 inputs of a token: its scale is absmax / 127, its integers are x * (127 / absmax), rounded to
   nearest, ties to even. A block below 2^-100 counts as zeros. A block that holds NaN or infinity gets the scale NaN, so y is NaN.
   Products are formed in integers, (code - zero) * x as code * x + zero * -x, and summed over a block; sums of blocks are fp32.

   Included like loops.h, after it. A Math has
     Bytes                            64 bytes: codes of weights, or integers of x;  load(from)
     Ints                             the products of a word, summed within its two blocks;  none()
     Sum                              fp32 sums of a row;  zero(), reduce
     Codes<BITS>(bits, shift), get(from)   64 codes of so many bits, packed one after the other, less shift; may read 64 bytes. BITS: 8,
                                      4 if `fours`, or 0 for any
     ahead<BITS>()                    true if spread() takes codes from memory, where they are best stored a while before
     spread(kept, codes, fill)        the next codes where bits are set, else those of fill
     spread<BITS, ZEROS>(kept, codes, fill, middle)   the same from memory; unless ZEROS, fill is `middle` everywhere
     fill(low, high)                  `low` 32 times, then `high` 32 times, as codes
     signs<BITS>()                    true if codes are made signed by a shift of 2^(bits - 1), because products are faster then
     dot<SIGNED>(ints, codes, x)      ints + codes * x
     Scales(low, high, half)          two times 4 scales, of a panel's rows in both blocks of a word
     factors(scales, x_scales)        Factors: the same times the scales of x
     madd<SIGNED>(sum, ints, factors, row)   sum + ints * the row's factor
     lanes, Lane, Floats              tokens in a register, of int32 and of fp32; see multiply()
     rows(c), columns                 rows of weights that are multiplied together with c registers of tokens, at most `columns`
     Pairs<BITS>(from), dot(x)        a word of a panel as the strategy `pairs` has it: the sums of four rows in both of its blocks
     RowSums                          fp32 sums of four rows;  no_rows(), madd_pairs(sums, dot(x), scales, scales of x), totals
     merges<BITS>()                   true if a word's products of four rows are brought into one register: madd_rows(sums, ints, factors)
     few<BITS>()                      true if Codes have few(from), which is get() for at most 32 codes, and cheaper
   Shapes: as in loops.h. */

/* what an instruction set has no use for */
struct Without {
  template <int>
  static constexpr bool merges() {
    return false;
  }
  template <int>
  static constexpr bool few() {
    return false;
  }
};

/* what a stream reads of x for a word */
struct XWord {
  int8_t x[64];
  int8_t negative[64];
  float scale[16]; /* of the first block eight times, then of the second */
};

/* The same for pairs: inputs 0-15, 32-47, 16-31 and 48-63, so that each half is 16 inputs of either block. */
struct XPairs {
  int8_t x[64];
  float scale[8]; /* of the first block four times, then of the second */
};

/* x's integers, 32 of them, and their scale */
inline float quantize_block(const float* x, int8_t* out) {
  uint32_t bits[32], most = 0;
  __builtin_memcpy(bits, x, sizeof(bits));
  for (int i = 0; i < 32; ++i) {
    const uint32_t absolute = bits[i] & 0x7fffffffu;
    most = most > absolute ? most : absolute;
  }
  float absmax;
  __builtin_memcpy(&absmax, &most, 4);
  const bool numbers = most < 0x7f800000u, some = absmax >= 0x1p-100f;
  const float inverse = numbers && some ? 127.0f / absmax : 0.0f;
  for (int i = 0; i < 32; ++i) {
    /* adding 1.5 * 2^23 rounds to an integer, which is then the low bits */
    const float shifted = (numbers ? x[i] : 0.0f) * inverse + 12582912.0f;
    uint32_t low;
    __builtin_memcpy(&low, &shifted, 4);
    out[i] = static_cast<int8_t>(low);
  }
  return !numbers ? __builtin_nanf("") : some ? absmax / 127.0f : 0.0f;
}

template <class Math>
struct Integers {
  using Bytes = typename Math::Bytes;
  using Ints = typename Math::Ints;
  using Sum = typename Math::Sum;
  static constexpr int P = SECATEURS_PANEL, WORD = SECATEURS_WORD, BLOCK = 32;
  static constexpr int LANES = Math::lanes;
  static constexpr int GROUP = 6;      /* panels that share a pass over x */
  static constexpr int64_t DEPTH = 8;  /* words of that pass */
  static constexpr int STRIDE = DEPTH * WORD;

  /* ----------------------------------------------------------------------------------------------------- numbers */

  static float number(int32_t dtype, const void* from, int64_t i) {
    if (dtype == SECATEURS_FP32) return static_cast<const float*>(from)[i];
    const uint16_t half = static_cast<const uint16_t*>(from)[i];
    return dtype == SECATEURS_BF16 ? bf16_to_float(half) : Math::from_half(half);
  }
  static void finish(const Call& call, const Product& product, int64_t token, int64_t output, float sum) {
    if (product.bias) sum += number(call.dtype, product.bias, output);
    const int64_t at = token * product.weight.outputs + output;
    if (call.dtype == SECATEURS_FP32)
      static_cast<float*>(product.y)[at] = sum;
    else
      static_cast<uint16_t*>(product.y)[at] = call.dtype == SECATEURS_BF16 ? bf16_from_float(sum) : Math::to_half(sum);
  }
  /* the inputs of a block, zeros beyond the last */
  static void fetch(const Call& call, int64_t token, int64_t input, float* to) {
    const int64_t from = token * call.inputs + input, n = least(BLOCK, call.inputs - input);
    if (n < BLOCK)
      for (int i = 0; i < BLOCK; ++i) to[i] = 0;
    if (call.dtype == SECATEURS_FP32) {
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<const float*>(call.x)[from + i];
    } else {
      const uint16_t* x = static_cast<const uint16_t*>(call.x) + from;
      if (call.dtype == SECATEURS_BF16)
        for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_float(x[i]);
      else
        for (int64_t i = 0; i < n; ++i) to[i] = Math::from_half(x[i]);
    }
  }
  static float scale_of(const secateurs_weight& w, int64_t i) {
    return w.half ? Math::from_half(w.scale[i]) : bf16_to_float(w.scale[i]);
  }

  /* which groups a word's two blocks are in */
  struct Groups {
    int64_t count;
    int shift;
    explicit Groups(const secateurs_weight& w)
        : count(w.group ? ceil_div(w.inputs, w.group) : 1), shift(w.group ? __builtin_ctz(static_cast<unsigned>(w.group)) : 62) {}
    int64_t low(int64_t word) const { return least(word * WORD >> shift, count - 1); }
    int64_t high(int64_t word) const { return least((word * WORD + BLOCK) >> shift, count - 1); }
  };

  static const uint8_t* values_of(const Call& call, const secateurs_weight& w, int64_t panel) {
    return static_cast<const uint8_t*>(w.values) + (w.mask ? w.starts[panel] : panel * call.words * P * 8 * w.bits);
  }
  static int64_t run_bytes(uint64_t kept, int bits) { return (__builtin_popcountll(kept) * bits + 7) >> 3; }

  /* The codes of the next words of a panel as bytes, for Maths that spread them from memory. */
  template <int BITS>
  struct Ahead {
    static constexpr int WORDS = 8;
    alignas(64) uint8_t codes[WORDS * P][WORD];
    uint8_t beyond[WORD];
    /* values: the panel's next; returns those after `words` words */
    const uint8_t* fill(const typename Math::template Codes<BITS>& unpack, const uint64_t* mask, const uint8_t* values, int64_t words,
                        int bits) {
      for (int64_t run = 0; run < words * P; ++run) {
        Math::store(codes[run], unpack.get(values));
        values += run_bytes(mask[run], bits);
      }
      return values;
    }
  };

  /* ------------------------------------------------------------------------------------------------------ stream */

  static int64_t stream_bytes(const Call& call) { return call.tokens * call.words * static_cast<int64_t>(sizeof(XWord)); }
  static int64_t stream_pieces(const Call& call) { return call.tokens * call.words; }
  static void stream_prepare(const Call& call, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      XWord& to = static_cast<XWord*>(call.packed)[piece];
      for (int b = 0; b < 2; ++b) {
        float x[BLOCK];
        const int64_t input = piece % call.words * WORD + b * BLOCK;
        fetch(call, piece / call.words, least(input, call.inputs), x);
        const float scale = quantize_block(x, to.x + b * BLOCK);
        for (int i = 0; i < 8; ++i) to.scale[8 * b + i] = scale;
      }
      for (int i = 0; i < WORD; ++i) to.negative[i] = static_cast<int8_t>(-to.x[i]);
    }
  }

  /* One panel: the codes of 4 rows lie in one stream. ZEROS: every group has a zero of its own. FEW: hardly a run has more than 32. */
  template <bool MASKED, bool ZEROS, int BITS, bool FEW, int TOKENS>
  static void stream_panel(const Call& call, const Product& product, int64_t panel, int64_t token) {
    const secateurs_weight& w = product.weight;
    const int64_t words = call.words;
    const XWord* x = static_cast<const XWord*>(call.packed) + token * words;
    const uint8_t* values = values_of(call, w, panel);
    const uint64_t* mask = MASKED ? w.mask + panel * words * P : nullptr;
    const Groups groups(w);
    const uint16_t* scales = w.scale + panel * groups.count * P;
    const uint8_t* zeros = ZEROS ? w.zero + panel * groups.count * P : nullptr;
    const int bits = BITS ? BITS : w.bits;
    constexpr bool SIGNED = Math::template signs<BITS>();
    const int middle = 1 << (bits - 1), shift = SIGNED ? middle : 0;
    const typename Math::template Codes<BITS> codes(bits, shift);
    Bytes fill = Math::fill(middle - shift, middle - shift);
    constexpr bool AHEAD = MASKED && Math::template ahead<BITS>();
    Ahead<BITS> ahead;
    /* one of the two is used */
    constexpr bool MERGES = Math::template merges<BITS>();
    Sum sum[P][TOKENS];
    typename Math::RowSums merged[TOKENS];
    for (int r = 0; r < P; ++r)
      for (int t = 0; t < TOKENS; ++t) sum[r][t] = Math::zero();
    for (int t = 0; t < TOKENS; ++t) merged[t] = Math::no_rows();
    for (int64_t j = 0; j < words; ++j) {
      if (AHEAD && j % ahead.WORDS == 0) values = ahead.fill(codes, mask, values, least(ahead.WORDS, words - j), bits);
      /* a page ahead, of a mask as much as half of the weights take: hardware prefetching stops at the end of a page */
#pragma GCC unroll 4
      for (int line = 0; line < (BITS == 8 ? 4 : 2) / (MASKED ? 2 : 1); ++line) __builtin_prefetch(values + 4096 + 64 * line);
      if (MASKED) __builtin_prefetch(reinterpret_cast<const char*>(mask) + 1024);
      const int64_t low = groups.low(j) * P, high = groups.high(j) * P;
      const typename Math::Scales scale(scales + low, scales + high, w.half);
      Ints start[TOKENS];
      if (!ZEROS)
        for (int t = 0; t < TOKENS; ++t)
          start[t] = SIGNED ? Math::none() : Math::template dot<SIGNED>(Math::none(), fill, Math::load(x[t * words + j].negative));
      typename Math::Factors factor[TOKENS];
      for (int t = 0; t < TOKENS; ++t) factor[t] = Math::factors(scale, x[t * words + j].scale);
      Ints products[TOKENS][P];
#pragma GCC unroll 4
      for (int r = 0; r < P; ++r) {
        if (ZEROS) fill = Math::fill(zeros[low + r] - shift, zeros[high + r] - shift);
        Bytes row;
        if constexpr (MASKED) {
          const uint64_t& kept = *mask++;
          if constexpr (AHEAD) {
            row = Math::template spread<BITS, ZEROS>(kept, ahead.codes[j % ahead.WORDS * P + r], fill, middle);
          } else {
            const int64_t nbytes = run_bytes(kept, bits);
            if constexpr (BITS == 8)
              row = Math::template spread<BITS, ZEROS>(kept, values, fill, middle);
            else if constexpr (FEW)
              row = Math::spread(kept, __builtin_expect(nbytes > 4 * BITS, 0) ? codes.get(values) : codes.few(values), fill);
            else
              row = Math::spread(kept, codes.get(values), fill);
            values += nbytes;
          }
        } else {
          row = codes.get(values);
          values += 8 * bits;
        }
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
          const XWord& here = x[t * words + j];
          Ints ints = ZEROS ? Math::template dot<SIGNED>(Math::none(), fill, Math::load(here.negative)) : start[t];
          ints = Math::template dot<SIGNED>(ints, row, Math::load(here.x));
          if (MERGES)
            products[t][r] = ints;
          else
            sum[r][t] = Math::template madd<SIGNED>(sum[r][t], ints, factor[t], r);
        }
      }
      if constexpr (MERGES)
        for (int t = 0; t < TOKENS; ++t) merged[t] = Math::madd_rows(merged[t], products[t], factor[t]);
    }
    float total[TOKENS][P];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t) {
      if (MERGES) Math::totals(merged[t], total[t]);
#pragma GCC unroll 4
      for (int r = 0; r < P && !MERGES; ++r) total[t][r] = Math::reduce(sum[r][t]);
    }
    for (int r = 0; r < P && panel * P + r < w.outputs; ++r)
      for (int t = 0; t < TOKENS; ++t) finish(call, product, token + t, panel * P + r, total[t][r]);
  }

  template <bool MASKED, bool ZEROS, int BITS, bool FEW>
  static void stream_all(const Call& call, const Product& product, int64_t panel) {
    int64_t t = 0;
    for (; t + 4 <= call.tokens; t += 4) stream_panel<MASKED, ZEROS, BITS, FEW, 4>(call, product, panel, t);
    for (; t + 2 <= call.tokens; t += 2) stream_panel<MASKED, ZEROS, BITS, FEW, 2>(call, product, panel, t);
    for (; t < call.tokens; ++t) stream_panel<MASKED, ZEROS, BITS, FEW, 1>(call, product, panel, t);
  }

  template <bool MASKED, bool ZEROS, int BITS>
  static void stream_tokens(const Call& call, const Product& product, int64_t begin, int64_t end) {
    const secateurs_weight& w = product.weight;
    for (int64_t p = begin; p < end; ++p) {
      /* with 24 of 64 on average more than 32 are rare: 2.3 standard deviations at random */
      constexpr bool FEW = MASKED && Math::template few<BITS>();
      if (FEW && w.starts[p + 1] - w.starts[p] <= call.words * P * 3 * BITS)
        stream_all<MASKED, ZEROS, BITS, FEW>(call, product, p);
      else
        stream_all<MASKED, ZEROS, BITS, false>(call, product, p);
    }
  }
  template <bool MASKED, bool ZEROS>
  static void stream_bits(const Call& call, const Product& product, int64_t begin, int64_t end) {
    const int bits = product.weight.bits;
    if (bits == 8)
      stream_tokens<MASKED, ZEROS, 8>(call, product, begin, end);
    else if (Math::fours && bits == 4)
      stream_tokens<MASKED, ZEROS, Math::fours ? 4 : 0>(call, product, begin, end);
    else
      stream_tokens<MASKED, ZEROS, 0>(call, product, begin, end);
  }
  template <bool MASKED>
  static void stream(const Call& call, const Product& product, int64_t begin, int64_t end, void*) {
    if (product.weight.zero)
      stream_bits<MASKED, true>(call, product, begin, end);
    else
      stream_bits<MASKED, false>(call, product, begin, end);
  }

  /* ------------------------------------------------------------------------------------------------------- pairs */

  static int64_t pairs_bytes(const Call& call) { return call.tokens * call.words * static_cast<int64_t>(sizeof(XPairs)); }
  static void pairs_prepare(const Call& call, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      XPairs& to = static_cast<XPairs*>(call.packed)[piece];
      for (int b = 0; b < 2; ++b) {
        float x[BLOCK];
        int8_t whole[BLOCK];
        const int64_t input = piece % call.words * WORD + b * BLOCK;
        fetch(call, piece / call.words, least(input, call.inputs), x);
        const float scale = quantize_block(x, whole);
        for (int h = 0; h < 2; ++h) __builtin_memcpy(to.x + 32 * h + 16 * b, whole + 16 * h, 16);
        for (int i = 0; i < 4; ++i) to.scale[4 * b + i] = scale;
      }
    }
  }

  /* At most two survivors of four: no bit is counted, and x is fetched for the survivors instead of spreading them. */
  template <int BITS, int TOKENS>
  static void pairs_panel(const Call& call, const Product& product, int64_t panel, int64_t token) {
    const secateurs_weight& w = product.weight;
    const int64_t words = call.words;
    const XPairs* x = static_cast<const XPairs*>(call.packed) + token * words;
    constexpr int64_t STEP = 32 + 16 * BITS;
    const uint8_t* at = static_cast<const uint8_t*>(w.pairs) + panel * words * STEP;
    const Groups groups(w);
    const uint16_t* scales = w.scale + panel * groups.count * P;
    typename Math::RowSums sum[TOKENS];
    for (int t = 0; t < TOKENS; ++t) sum[t] = Math::no_rows();
    for (int64_t j = 0; j < words; ++j, at += STEP) {
#pragma GCC unroll 4
      for (int line = 0; line < BITS / 4 + 1; ++line) __builtin_prefetch(at + 4096 + 64 * line);
      const typename Math::Scales scale(scales + groups.low(j) * P, scales + groups.high(j) * P, w.half);
      const typename Math::template Pairs<BITS> pairs(at);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) {
        const XPairs& here = x[t * words + j];
        sum[t] = Math::madd_pairs(sum[t], pairs.dot(here.x), scale, here.scale);
      }
    }
    for (int t = 0; t < TOKENS; ++t) {
      float total[P];
      Math::totals(sum[t], total);
      for (int r = 0; r < P && panel * P + r < w.outputs; ++r) finish(call, product, token + t, panel * P + r, total[r]);
    }
  }
  template <int BITS>
  static void pairs(const Call& call, const Product& product, int64_t begin, int64_t end, void*) {
    for (int64_t p = begin; p < end; ++p) {
      int64_t t = 0;
      for (; t + 4 <= call.tokens; t += 4) pairs_panel<BITS, 4>(call, product, p, t);
      for (; t + 2 <= call.tokens; t += 2) pairs_panel<BITS, 2>(call, product, p, t);
      for (; t < call.tokens; ++t) pairs_panel<BITS, 1>(call, product, p, t);
    }
  }

  /* -------------------------------------------------------------------------------------------------------- tile */

  /* what a tile reads of x for a block: of LANES tokens */
  struct XBlock {
    int8_t x[BLOCK / 4][LANES][4];
    float scale[LANES];
    int32_t sum[LANES];
  };
  static int64_t columns_of(const Call& call) { return ceil_div(call.tokens, LANES); }
  static int64_t tile_bytes(const Call& call) {
    return columns_of(call) * call.words * 2 * static_cast<int64_t>(sizeof(XBlock));
  }
  static int64_t tile_pieces(const Call& call) { return columns_of(call) * call.words * 2; }
  static void tile_prepare(const Call& call, int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      XBlock& to = static_cast<XBlock*>(call.packed)[piece];
      const int64_t first = piece / (2 * call.words) * LANES, input = least(piece % (2 * call.words) * BLOCK, call.inputs);
      for (int lane = 0; lane < LANES; ++lane) {
        float x[BLOCK] = {};
        int8_t whole[BLOCK];
        if (first + lane < call.tokens) fetch(call, first + lane, input, x);
        to.scale[lane] = quantize_block(x, whole);
        int32_t sum = 0;
        for (int i = 0; i < BLOCK; ++i) sum += whole[i];
        to.sum[lane] = sum;
        for (int q = 0; q < BLOCK / 4; ++q) __builtin_memcpy(to.x[q][lane], whole + 4 * q, 4);
      }
    }
  }

  /* A group of panels, as far as a pass goes: codes as bytes, and what belongs to each block of them. */
  struct Tile {
    uint8_t codes[GROUP * P][STRIDE];
    float scale[GROUP * P][2 * DEPTH];
    int32_t zero[GROUP * P][2 * DEPTH];
  };
  static int64_t tile_scratch(const Call& call) {
    return static_cast<int64_t>(sizeof(Tile)) + GROUP * P * columns_of(call) * LANES * 4;
  }

  template <bool MASKED, int BITS>
  static const uint8_t* expand_panel(const Call& call, const secateurs_weight& w, int64_t panel, int64_t deep, int64_t depth,
                                     const uint8_t* values, int64_t row, Tile& tile) {
    const int bits = BITS ? BITS : w.bits;
    const int middle = 1 << (bits - 1), shift = Math::template signs<BITS>() ? middle : 0;
    const typename Math::template Codes<BITS> codes(bits, shift);
    const Groups groups(w);
    const uint64_t* mask = MASKED ? w.mask + (panel * call.words + deep) * P : nullptr;
    constexpr bool AHEAD = MASKED && Math::template ahead<BITS>();
    Ahead<BITS> ahead;
    static_assert(ahead.WORDS == DEPTH, "a pass is unpacked at once");
    if (AHEAD) values = ahead.fill(codes, mask, values, depth, bits);
    for (int64_t j = 0; j < depth; ++j) {
      const int64_t low = (panel * groups.count + groups.low(deep + j)) * P, high = (panel * groups.count + groups.high(deep + j)) * P;
#pragma GCC unroll 4
      for (int r = 0; r < P; ++r) {
        const int zero[2] = {(w.zero ? w.zero[low + r] : middle) - shift, (w.zero ? w.zero[high + r] : middle) - shift};
        Bytes found;
        if constexpr (MASKED) {
          const uint64_t& kept = *mask++;
          const uint8_t* from = AHEAD ? ahead.codes[j * P + r] : values;
          const Bytes fill = Math::fill(zero[0], zero[1]);
          if constexpr (!AHEAD && BITS != 8)
            found = Math::spread(kept, codes.get(from), fill);
          else
            found = w.zero ? Math::template spread<BITS, true>(kept, from, fill, middle) : Math::template spread<BITS, false>(kept, from, fill, middle);
          if (!AHEAD) values += run_bytes(kept, bits);
        } else {
          found = codes.get(values);
          values += 8 * bits;
        }
        Math::store(tile.codes[row + r] + j * WORD, found);
        for (int b = 0; b < 2; ++b) {
          tile.scale[row + r][2 * j + b] = scale_of(w, (b ? high : low) + r);
          tile.zero[row + r][2 * j + b] = zero[b];
        }
      }
    }
    return values;
  }

  /* ROWS rows x COLUMNS registers of tokens += codes * x. A register has 4 inputs of LANES tokens. */
  template <bool SIGNED, int ROWS, int COLUMNS>
  static void multiply(const Tile& tile, int64_t row, int64_t blocks, const XBlock* x, int64_t step, float* sums, int64_t stride) {
    using Lane = typename Math::Lane;
    for (int64_t b = 0; b < blocks; ++b) {
      Lane part[ROWS][COLUMNS];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) {
        const Lane sum = Math::load_lane(x[c * step + b].sum);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) part[r][c] = Math::times(sum, -tile.zero[row + r][b]);
      }
#pragma GCC unroll 8
      for (int q = 0; q < BLOCK / 4; ++q) {
        Lane column[COLUMNS];
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) column[c] = Math::load_lane(x[c * step + b].x[q]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const auto four = Math::template splat<SIGNED>(tile.codes[row + r] + b * BLOCK + 4 * q);
#pragma GCC unroll 8
          for (int c = 0; c < COLUMNS; ++c) part[r][c] = Math::template dot4<SIGNED>(part[r][c], four, column[c]);
        }
      }
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c)
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
          Math::add_to(sums + r * stride + c * LANES, part[r][c], x[c * step + b].scale, tile.scale[row + r][b]);
    }
  }
  template <bool SIGNED, int COLUMNS>
  static void multiply_rows(const Tile& tile, int64_t rows, int64_t blocks, const XBlock* x, int64_t step, float* sums, int64_t stride) {
    constexpr int R = Math::int_rows(COLUMNS);
    int64_t r = 0;
    for (; r + R <= rows; r += R) multiply<SIGNED, R, COLUMNS>(tile, r, blocks, x, step, sums + r * stride, stride);
    for (; r < rows; r += 2) multiply<SIGNED, 2, COLUMNS>(tile, r, blocks, x, step, sums + r * stride, stride);
  }

  template <bool MASKED, int BITS>
  static void tile_bits(const Call& call, const Product& product, int64_t begin, int64_t end, void* scratch) {
    const secateurs_weight& w = product.weight;
    constexpr bool SIGNED = Math::template signs<BITS>();
    Tile& tile = *static_cast<Tile*>(scratch);
    float* sums = reinterpret_cast<float*>(&tile + 1);
    const int64_t columns = columns_of(call), stride = columns * LANES, step = 2 * call.words;
    for (int64_t group = begin; group < end; group += GROUP) {
      const int64_t panels = least(GROUP, end - group), rows = panels * P;
      const uint8_t* values[GROUP];
      for (int64_t p = 0; p < panels; ++p) values[p] = values_of(call, w, group + p);
      for (int64_t i = 0; i < rows * stride; ++i) sums[i] = 0;
      for (int64_t deep = 0; deep < call.words; deep += DEPTH) {
        const int64_t depth = least(DEPTH, call.words - deep);
        for (int64_t p = 0; p < panels; ++p)
          values[p] = expand_panel<MASKED, BITS>(call, w, group + p, deep, depth, values[p], p * P, tile);
        for (int64_t c = 0; c < columns; c += Math::int_columns) {
          const XBlock* x = static_cast<const XBlock*>(call.packed) + c * step + 2 * deep;
          float* to = sums + c * LANES;
          switch (least(Math::int_columns, columns - c)) {
            case 1: multiply_rows<SIGNED, 1>(tile, rows, 2 * depth, x, step, to, stride); break;
            case 2: multiply_rows<SIGNED, 2>(tile, rows, 2 * depth, x, step, to, stride); break;
            case 3: multiply_rows<SIGNED, Math::int_columns < 3 ? 1 : 3>(tile, rows, 2 * depth, x, step, to, stride); break;
            default: multiply_rows<SIGNED, Math::int_columns < 4 ? 1 : 4>(tile, rows, 2 * depth, x, step, to, stride);
          }
        }
      }
      for (int64_t t = 0; t < call.tokens; ++t)
        for (int64_t r = 0; r < rows && group * P + r < w.outputs; ++r)
          finish(call, product, t, group * P + r, sums[r * stride + t]);
    }
  }
  template <bool MASKED>
  static void tile(const Call& call, const Product& product, int64_t begin, int64_t end, void* scratch) {
    const int bits = product.weight.bits;
    if (bits == 8)
      tile_bits<MASKED, 8>(call, product, begin, end, scratch);
    else if (Math::fours && bits == 4)
      tile_bits<MASKED, Math::fours ? 4 : 0>(call, product, begin, end, scratch);
    else
      tile_bits<MASKED, 0>(call, product, begin, end, scratch);
  }

  static int64_t none(const Call&) { return 0; }

  /* what multiply() does, on registers alone */
  static double spin(int64_t rounds) {
    const uint8_t code[4] = {1, 1, 1, 1};
    alignas(64) int8_t ones[LANES][4] = {};
    const auto four = Math::template splat<false>(code);
    const auto x = Math::load_lane(ones);
    typename Math::Lane sum[16];
    for (int s = 0; s < 16; ++s) sum[s] = x;
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
      for (int s = 0; s < 16; ++s) {
        sum[s] = Math::template dot4<false>(sum[s], four, x);
        Math::keep(sum[s]);
      }
    }
    return 2.0 * 16 * 4 * LANES * static_cast<double>(rounds);
  }
};

#define SECATEURS_INTEGERS_OF(format, isa, bits, Math, MASKED)                                                                   \
  const KernelBody format##_int##bits##_##isa##_stream = {                                                                      \
      Integers<Math>::stream_bytes, Integers<Math>::stream_pieces,  Integers<Math>::stream_prepare,                             \
      Integers<Math>::none,         Integers<Math>::stream<MASKED>, Integers<Math>::spin};                                      \
  const KernelBody format##_int##bits##_##isa##_tile = {                                                                        \
      Integers<Math>::tile_bytes,   Integers<Math>::tile_pieces,  Integers<Math>::tile_prepare,                                 \
      Integers<Math>::tile_scratch, Integers<Math>::tile<MASKED>, Integers<Math>::spin};
#define SECATEURS_INTEGERS_BOTH(isa, bits, Math)            \
  SECATEURS_INTEGERS_OF(bitmask, isa, bits, Math, true)     \
  SECATEURS_INTEGERS_OF(dense, isa, bits, Math, false)
#define SECATEURS_PAIRS(isa, bits, Math)                                                                              \
  const KernelBody bitmask_int##bits##_##isa##_pairs = {                                                             \
      Integers<Math>::pairs_bytes, Integers<Math>::stream_pieces, Integers<Math>::pairs_prepare, Integers<Math>::none, \
      Integers<Math>::pairs<bits>, Integers<Math>::spin};
#define SECATEURS_INTEGERS(isa, Math)   \
  SECATEURS_PAIRS(isa, 8, Math)         \
  SECATEURS_PAIRS(isa, 4, Math)         \
  SECATEURS_INTEGERS_BOTH(isa, 8, Math) \
  SECATEURS_INTEGERS_BOTH(isa, 6, Math) \
  SECATEURS_INTEGERS_BOTH(isa, 5, Math) \
  SECATEURS_INTEGERS_BOTH(isa, 4, Math) \
  SECATEURS_INTEGERS_BOTH(isa, 3, Math) \
  SECATEURS_INTEGERS_BOTH(isa, 2, Math)
