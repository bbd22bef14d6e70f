/* What the dispatcher knows of a kernel: how x must be laid out for it, and a function over a range of panels. */
#ifndef SECATEURS_KERNEL_H
#define SECATEURS_KERNEL_H

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

#define KERNEL(format, dtype, isa, strategy) extern const KernelBody format##_##dtype##_##isa##_##strategy;
#include "kernels.inc"
#undef KERNEL

#endif
