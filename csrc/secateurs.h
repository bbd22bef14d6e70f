/* The C interface of the CPU kernels. Python calls it through ctypes; nothing here knows torch.

   The bitmask layout is specified in docs/format.md: rows in panels of 4, inputs in words of 64, survivors in the order
   of their bits. A kernel trusts its arguments: whatever comes from a file passes secateurs_check_bitmask first. */
#ifndef SECATEURS_H
#define SECATEURS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SECATEURS_API __attribute__((visibility("default")))

/* of this interface; the Python side refuses a library of another number */
#define SECATEURS_ABI 2

enum { SECATEURS_PANEL = 4, SECATEURS_WORD = 64 };
enum { SECATEURS_OK = 0, SECATEURS_BAD_KERNEL = 1, SECATEURS_BAD_ARGUMENT = 2, SECATEURS_NO_MEMORY = 3 };

/* One weight matrix. values: survivors, followed by 64 bytes that a load may touch; or, with mask null, the dense
   outputs x inputs matrix, which needs no such bytes. starts: the first survivor of each panel, and the end. most: the most
   survivors of any byte of the mask, as secateurs_check_bitmask finds them, or 8; a panel that has as many in all has them in
   each byte (N:M with exactly N). steps, step_starts: what secateurs_fill_steps makes, for kernels of the strategy `gather`;
   else null. */
typedef struct {
  int64_t outputs;
  int64_t inputs;
  const uint64_t* mask;
  const void* values;
  const int64_t* starts;
  int64_t most;
  const void* steps;
  const int64_t* step_starts;
} secateurs_weight;

/* y (tokens x outputs) = x weight' + bias; bias may be null. All of one dtype. */
typedef struct {
  secateurs_weight weight;
  const void* bias;
} secateurs_product;

/* fn(begin, end, context) over pieces of [begin, end), as torch_parallel_for does it */
typedef void (*secateurs_range)(int64_t begin, int64_t end, void* context);
typedef int32_t (*secateurs_parallel_for)(int64_t begin, int64_t end, int64_t grain, secateurs_range fn, void* context);

typedef struct {
  const char* name;
  const char* format;
  const char* dtype;
  const char* isa;
  const char* strategy;
  int32_t runnable; /* on this CPU */
} secateurs_kernel;

SECATEURS_API int32_t secateurs_abi(void);
SECATEURS_API int32_t secateurs_kernels(void);
SECATEURS_API int32_t secateurs_kernel_info(int32_t kernel, secateurs_kernel* out);

/* null: every call runs on the calling thread */
SECATEURS_API void secateurs_use_threads(secateurs_parallel_for parallel_for);

/* Products that share their input x (tokens x inputs); y: their results one after the other, each tokens x outputs.
   At most `threads` pieces at a time. */
SECATEURS_API int32_t secateurs_linear(int32_t kernel, const secateurs_product* products, int32_t count, const void* x,
                                       void* y, int64_t tokens, int32_t threads);

/* Is a mask sound? Fills starts (panels + 1). 0 if `survivors` are exactly the set bits and no bit lies outside of
   outputs x inputs, with where[0] the number of bits and where[1] the most in any byte; else 1 (a bit beyond the last input),
   2 (beyond the last output), 3 (another count), with where[0] the row and where[1] the input, or where[0] the number of bits. */
SECATEURS_API int32_t secateurs_check_bitmask(const uint64_t* mask, int64_t outputs, int64_t inputs, int64_t survivors,
                                              int64_t* starts, int64_t* where);

/* The layout of the strategy `gather`, for at most 65536 inputs. A panel is a number of steps, a step two survivors of each
   of its 4 rows: 8 bytes that say how far each is from the one two before it in its row, then the 8 values; the four rows'
   next ones first, then those after. A zero stands where a row has no more, or where none is near enough for a byte. */
/* fills step_starts (panels + 1) and returns the number of steps */
SECATEURS_API int64_t secateurs_count_steps(const secateurs_weight* weight, int64_t* step_starts);
/* fills weight->steps: 8 * (1 + itemsize) bytes a step */
SECATEURS_API void secateurs_fill_steps(const secateurs_weight* weight, int32_t itemsize, int32_t threads);

/* Bytes a second that `threads` threads read from a buffer, and the fastest multiply-adds: for the probe. */
SECATEURS_API double secateurs_read(const void* buffer, int64_t nbytes, int32_t threads);
SECATEURS_API double secateurs_spin(int32_t kernel, int64_t rounds, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
