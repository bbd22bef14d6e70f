/* The C interface of the CPU kernels. Python calls it through ctypes; nothing here knows torch.

   The bitmask layout is specified in docs/format.md: rows in panels of 4, inputs in words of 64, survivors in the order
   of their bits. A kernel does not check its arguments: whatever comes from a file must pass secateurs_check_bitmask first. */
#ifndef SECATEURS_H
#define SECATEURS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SECATEURS_API __attribute__((visibility("default")))

/* version of this interface; the Python side refuses a library with another one */
#define SECATEURS_ABI 5

enum { SECATEURS_PANEL = 4, SECATEURS_WORD = 64 };
/* of x, bias and y */
enum { SECATEURS_BF16 = 0, SECATEURS_FP16 = 1, SECATEURS_FP32 = 2 };
enum { SECATEURS_OK = 0, SECATEURS_BAD_KERNEL = 1, SECATEURS_BAD_ARGUMENT = 2, SECATEURS_NO_MEMORY = 3 };

/* One weight matrix. values: survivors, followed by 64 bytes that a load may touch; or, if mask is null, the dense
   outputs x inputs matrix, which needs no such bytes. starts: the index of each panel's first survivor, and the end. most: the
   highest number of survivors in any byte of the mask, as secateurs_check_bitmask finds it, or 8; a panel with most survivors
   a byte on average has exactly that many in every byte (N:M with exactly N). steps, step_starts: made by secateurs_fill_steps
   for kernels of the strategy `gather`; else null.

   bits: 0 if values are floats; else they are integers of so many bits, and a weight is scale * (integer - zero). The integers of
   one row and word begin at a byte; starts are then bytes, not survivors. Without a mask all 64 of a word are stored, also those
   beyond the last input or row. group: inputs that share a scale, 32, 64 or 128; 0: the whole row. half: scales are fp16, else
   bf16. scale, zero: [panels][groups][4]; zero is null if it is 2^(bits - 1) everywhere. pairs: made by secateurs_fill_pairs for
   kernels of the strategy `pairs`; else null. */
typedef struct {
  int64_t outputs;
  int64_t inputs;
  const uint64_t* mask;
  const void* values;
  const int64_t* starts;
  int64_t most;
  const void* steps;
  const int64_t* step_starts;
  int32_t bits;
  int32_t group;
  int32_t half;
  const uint16_t* scale;
  const uint8_t* zero;
  const void* pairs;
} secateurs_weight;

/* y (tokens x outputs) = x weight' + bias; bias may be null. All of one dtype, but for integers. */
typedef struct {
  secateurs_weight weight;
  const void* bias;
} secateurs_product;

/* calls fn(begin, end, context) for pieces of [begin, end), in parallel; the signature of torch_parallel_for */
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

/* Sets the thread pool. null: every call runs on the calling thread. */
SECATEURS_API void secateurs_use_threads(secateurs_parallel_for parallel_for);

/* Forms products that share their input x (tokens x inputs). y: the results one after the other, each tokens x outputs.
   dtype: of x, bias and y; that of the kernel, where the kernel has one. The work is split into at most `threads` pieces. */
SECATEURS_API int32_t secateurs_linear(int32_t kernel, const secateurs_product* products, int32_t count, const void* x,
                                       void* y, int32_t dtype, int64_t tokens, int32_t threads);

/* Products that share an input, without biases, and the kernel that forms them for one token. dtype: of x and y, as in secateurs_linear.
   biases: one for each product, of the block's dtype, or null. outputs: of all of them. */
typedef struct {
  const secateurs_product* products;
  const void* const* biases;
  int32_t count;
  int32_t kernel;
  int32_t dtype;
  int64_t outputs;
} secateurs_call;

enum { SECATEURS_SILU = 0, SECATEURS_GELU_TANH = 1 };

/* A block of a decoder whose input h (width) becomes
     h + residual * N2(O attention(rotated(Q n), rotated(K n), V n)) with n = N1(h), and then
     h + residual * N4(D (activation(G n) * (U n))) with n = N3(h).
   N1 attention_norm, N2 attention_out_norm, N3 mlp_norm, N4 mlp_out_norm, each N(x) = x / sqrt(mean(x x) + eps) * (weight + plus), or x
   where it is null. Where down.count is 0 it is the attention alone: O attention(...) of N1(h), to which nothing is added.
   dtype: of h, weights of norms, and the cache. q_norm and k_norm, or null: of every head (dim), or if heads_together of all
   of them at once (heads * dim, kv_heads * dim). qkv: one call of three products or of one that makes all, or three of one each;
   gate_up: one of two products or of one that makes both, or two of one each; a call that is not needed has count 0. */
typedef struct {
  int32_t dtype;
  int32_t activation;
  int64_t width;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  int64_t inner;
  float scaling;
  float residual;
  float eps;
  float eps_of_heads;
  float plus;
  int32_t heads_together;
  const void* attention_norm;
  const void* attention_out_norm;
  const void* mlp_norm;
  const void* mlp_out_norm;
  const void* q_norm;
  const void* k_norm;
  secateurs_call qkv[3];
  secateurs_call out;
  secateurs_call gate_up[2];
  secateurs_call down;
} secateurs_block;

/* The block for one token after `tokens` others. cos, sin (rotated): the first `rotated` inputs of a head turn, in halves. keys, values
   (kv_heads x room x dim): the token's are written behind the others', so room > tokens. x and y (width) may be the same. */
SECATEURS_API int32_t secateurs_decode(const secateurs_block* block, const void* x, void* y, const void* cos, const void* sin,
                                       int32_t dtype_of_turns, int64_t rotated, void* keys, void* values, int64_t room, int64_t tokens, int32_t threads);

/* Checks a mask and fills starts (panels + 1), which count survivors, or bytes if bits > 0. Returns 0 if no bit lies outside of
   outputs x inputs and the end is `stored`; where[0] is then the end, where[1] the most survivors in any byte of the mask, where[2]
   the number of survivors, where[3] 1 if no four inputs, from a multiple of four on, keep more than two, and 0 if some do. Else
   returns 1 (a bit beyond the last input) or 2 (a bit beyond the last output), with where[0] the row and where[1] the input, or 3
   (another end), with where[0] the end. */
SECATEURS_API int32_t secateurs_check_bitmask(const uint64_t* mask, int64_t outputs, int64_t inputs, int32_t bits, int64_t stored,
                                              int64_t* starts, int64_t* where);

/* codes (outputs x inputs): each weight's integer plus zero, one byte each. write: fills weight->values from them, and what lies beyond
   the matrix with the code of zero; read: the inverse, with that code where no weight is stored. */
SECATEURS_API void secateurs_write_integers(const secateurs_weight* weight, const uint8_t* codes);
SECATEURS_API void secateurs_read_integers(const secateurs_weight* weight, uint8_t* codes);

/* Rows of a matrix whose integers are all stored, as numbers: out (count x inputs) of dtype. SECATEURS_BAD_ARGUMENT for one that is
   not there. */
SECATEURS_API int32_t secateurs_rows(const secateurs_weight* weight, const int64_t* rows, int64_t count, int32_t dtype, void* out);

/* The layout of the strategy `gather`, for at most 65536 inputs. A panel is a list of steps. A step holds two survivors of each
   of the panel's 4 rows: first 8 bytes, each survivor's distance in inputs from the one two before it in its row; then the 8
   values. In both, the next survivor of each of the four rows comes first, then the one after it. A zero value fills the place
   where a row has no more survivors, or where the next one is farther than a byte can say. */
/* Fills step_starts (panels + 1) and returns the number of steps. */
SECATEURS_API int64_t secateurs_count_steps(const secateurs_weight* weight, int64_t* step_starts);
/* Fills weight->steps: 8 * (1 + itemsize) bytes for each step. */
SECATEURS_API void secateurs_fill_steps(const secateurs_weight* weight, int32_t itemsize, int32_t threads);

/* The layout of the strategy `pairs`, for 8 or 4 bits, no zeros of groups and at most two survivors of four inputs: two places and
   integers for each four, whether they are used or not. A panel's word takes 32 + 16 * bits bytes. Survivor s of 0 to 3 of row r
   in part k of block b, which are 8 inputs from 32 b + 8 k on, is in lane 16 b + 4 r + s. First come 32 bytes, whose bits 2 k and
   2 k + 1 in each lane say which of its four inputs it is. Then integers: of 8 bits with a sign, 32 lanes for each k; of 4 bits plus
   8, 32 lanes for k = 0 and 1 and 32 for k = 2 and 3, the even k in the low halves. */
SECATEURS_API void secateurs_fill_pairs(const secateurs_weight* weight, int32_t threads);

/* For the probe, which times them. secateurs_read: `threads` threads read a buffer. secateurs_spin: they do independent
   multiply-adds with a kernel's instructions; returns the number of additions and multiplications. */
SECATEURS_API double secateurs_read(const void* buffer, int64_t nbytes, int32_t threads);
SECATEURS_API double secateurs_spin(int32_t kernel, int64_t rounds, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
