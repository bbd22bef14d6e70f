/* The thread pool, and memory that a thread keeps. For dispatch.cc and block.cc, which are compiled for every CPU. */
#ifndef SECATEURS_POOL_H
#define SECATEURS_POOL_H

#include <stdlib.h>

#include "secateurs.h"

/* calls fn for pieces of [0, pieces) on the pool, or on the calling thread if there is none */
void parallel(int64_t pieces, secateurs_range fn, void* context);

/* Memory that a thread keeps between calls, so that a product needs no system call. */
struct Kept {
  void* memory = nullptr;
  int64_t nbytes = 0;
  ~Kept() { free(memory); }
  void* get(int64_t wanted) {
    if (wanted > nbytes) {
      free(memory);
      nbytes = (wanted + 4095) / 4096 * 4096;
      memory = aligned_alloc(4096, static_cast<size_t>(nbytes));
      if (!memory) nbytes = 0;
    }
    return memory;
  }
};

#endif
