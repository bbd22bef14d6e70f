/* What the dispatcher knows of a kernel: how x must be laid out for it, and a function over a range of panels. */
#ifndef SECATEURS_KERNEL_H
#define SECATEURS_KERNEL_H

#include <stddef.h>

#include "secateurs.h"

/* One call. x: as given. packed: x as prepare() laid it out, or null. */
struct Call {
  const void* x;
  void* packed;
  int32_t dtype; /* of x and y */
  int64_t tokens;
  int64_t inputs;
  int64_t words; /* of 64 inputs in a row */
};

/* a product and where its result goes */
struct Product {
  secateurs_weight weight;
  const void* bias;
  void* y;
};

struct KernelBody {
  /* bytes that packed x takes; 0: the kernel reads x as it is */
  int64_t (*packed_bytes)(const Call&);
  /* the number of pieces of x that can be prepared independently; prepare() does pieces [begin, end) */
  int64_t (*pieces)(const Call&);
  void (*prepare)(const Call&, int64_t begin, int64_t end);
  /* bytes of scratch that one thread needs */
  int64_t (*scratch_bytes)(const Call&);
  /* computes panels [begin, end) of a product */
  void (*run)(const Call&, const Product&, int64_t begin, int64_t end, void* scratch);
  /* does rounds of 16 independent multiply-adds; returns the number of additions and multiplications */
  double (*spin)(int64_t rounds);
};

/* One head's part of attention: queries and out (queries x dim) of fp32; keys and values (tokens x dim) of dtype. scores: of so many
   floats as scores_of() says. */
struct Attention {
  const float* queries;
  int64_t count;
  const void* keys;
  const void* values;
  int32_t dtype;
  int64_t tokens;
  int64_t dim;
  float scaling;
  float* out;
};

/* What a decoder block does beside its products, for one token; n numbers each. */
struct BlockBody {
  void (*widen)(int32_t dtype, const void* from, int64_t n, float* to);
  void (*narrow)(int32_t dtype, const float* from, int64_t n, void* to);
  /* out = x / sqrt(mean(x x) + eps) * weight; out may be x */
  void (*norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  /* gate = activation(gate) * up */
  void (*gate)(int32_t activation, float* gate, const float* up, int64_t n);
  int64_t (*scores_of)(const Attention&);
  void (*attend)(const Attention&, float* scores);
};
extern const BlockBody block_avx512, block_avx2, block_neon, block_scalar;
/* that of the kernel's instruction set, or null */
const BlockBody* block_body(int32_t kernel);

#define KERNEL(format, dtype, isa, strategy) extern const KernelBody format##_##dtype##_##isa##_##strategy;
#include "kernels.inc"
#undef KERNEL

#endif
