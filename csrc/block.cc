/* A decoder block for one token in one call: between its products no tensor is made and no Python runs. */
#include <string.h>

#include "kernel.h"
#include "pool.h"

namespace {

thread_local Kept numbers, scores;

/* numbers are kept from multiples of this on */
constexpr int64_t LINE = 16;

struct Token {
  const secateurs_block& block;
  const BlockBody& body;
  int32_t threads;
  char* halves; /* x and y of a product that takes 16 bits; then a bias */
  int64_t room_for_x;
  float* factors; /* of a norm */

  /* y = the products of x, one after the other; of up to `most` calls */
  int32_t multiply(const secateurs_call* calls, int most, const float* x, float* y) const {
    for (int c = 0; c < most && calls[c].count; ++c) {
      const secateurs_call& call = calls[c];
      if (call.dtype == SECATEURS_FP32) {
        if (const int32_t wrong = secateurs_linear(call.kernel, call.products, call.count, x, y, call.dtype, 1, threads)) return wrong;
      } else {
        void *from = halves, *to = halves + 2 * room_for_x;
        body.narrow(call.dtype, x, call.products[0].weight.inputs, from);
        if (const int32_t wrong = secateurs_linear(call.kernel, call.products, call.count, from, to, call.dtype, 1, threads)) return wrong;
        body.widen(call.dtype, to, call.outputs, y);
      }
      float* bias = reinterpret_cast<float*>(halves);
      for (int32_t p = 0; p < call.count; ++p) {
        const int64_t outputs = call.products[p].weight.outputs;
        if (call.biases[p]) {
          body.widen(block.dtype, call.biases[p], outputs, bias);
          for (int64_t i = 0; i < outputs; ++i) y[i] += bias[i];
        }
        y += outputs;
      }
    }
    return SECATEURS_OK;
  }
  /* out = x normed, or x itself where there are no weights for it */
  const float* norm(const void* weight, const float* x, int64_t n, float eps, float* out) const {
    if (!weight) return x;
    body.widen(block.dtype, weight, n, factors);
    for (int64_t i = 0; i < n; ++i) factors[i] += block.plus;
    body.norm(x, factors, n, eps, out);
    return out;
  }
  /* h += residual * made, which a norm goes over first where there is one */
  void add(const void* weight, float* made, float* h) const {
    norm(weight, made, block.width, block.eps, made);
    for (int64_t i = 0; i < block.width; ++i) h[i] += block.residual * made[i];
  }
};

void rotate(float* head, const float* cos, const float* sin, int64_t rotated) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

struct Heads {
  const BlockBody& body;
  Attention first; /* of the first kv head; the others' lie behind it */
  int64_t cache; /* bytes from one kv head to the next */
  int64_t heads;
  int64_t parts;
  int32_t failed;
};

void attend_part(int64_t begin, int64_t end, void* context) {
  Heads& all = *static_cast<Heads*>(context);
  float* memory = static_cast<float*>(scores.get(all.body.scores_of(all.first) * static_cast<int64_t>(sizeof(float))));
  if (!memory) {
    __atomic_store_n(&all.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t part = begin; part < end; ++part)
    for (int64_t head = all.heads * part / all.parts; head < all.heads * (part + 1) / all.parts; ++head) {
      Attention one = all.first;
      one.queries += head * one.count * one.dim;
      one.out += head * one.count * one.dim;
      one.keys = static_cast<const char*>(one.keys) + head * all.cache;
      one.values = static_cast<const char*>(one.values) + head * all.cache;
      all.body.attend(one, memory);
    }
}

int64_t up(int64_t n) { return (n + LINE - 1) / LINE * LINE; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace

extern "C" int32_t secateurs_decode(const secateurs_block* block, const void* x, void* y, const void* cos, const void* sin,
                                    int32_t dtype_of_turns, int64_t rotated, void* keys, void* values, int64_t room, int64_t tokens, int32_t threads) {
  const secateurs_block& b = *block;
  const BlockBody* body = block_body(b.out.kernel);
  if (!body) return SECATEURS_BAD_KERNEL;
  if (threads < 1 || tokens < 0 || tokens >= room || b.kv_heads < 1 || b.heads % b.kv_heads || rotated % 2 || rotated > b.dim)
    return SECATEURS_BAD_ARGUMENT;
  const int64_t q = b.heads * b.dim, kv = b.kv_heads * b.dim, widest = larger(larger(q + 2 * kv, 2 * b.inner), b.width);
  /* h, h normed or what is added to it, all of q, k and v or of gate and up, what attention gives, cos, sin, 16-bit x and y, and the
     factors of a norm */
  const int64_t sizes[] = {up(b.width), up(b.width), up(widest), up(q), up(rotated), up(rotated), up(widest), up(larger(b.width, larger(b.dim, q)))};
  int64_t wanted = 0;
  for (int64_t size : sizes) wanted += size;
  float* memory = static_cast<float*>(numbers.get(wanted * static_cast<int64_t>(sizeof(float))));
  if (!memory) return SECATEURS_NO_MEMORY;
  float* at[8];
  for (int i = 0; i < 8; ++i, memory += sizes[i - 1]) at[i] = memory;
  float *h = at[0], *normed = at[1], *made = at[2], *attended = at[3], *cosines = at[4], *sines = at[5];
  const Token token = {b, *body, threads, reinterpret_cast<char*>(at[6]), widest, at[7]};

  body->widen(b.dtype, x, b.width, h);
  body->widen(dtype_of_turns, cos, rotated, cosines);
  body->widen(dtype_of_turns, sin, rotated, sines);
  if (const int32_t wrong = token.multiply(b.qkv, 3, token.norm(b.attention_norm, h, b.width, b.eps, normed), made)) return wrong;
  const int64_t itemsize = b.dtype == SECATEURS_FP32 ? 4 : 2;
  if (b.heads_together) {
    token.norm(b.q_norm, made, q, b.eps_of_heads, made);
    token.norm(b.k_norm, made + q, kv, b.eps_of_heads, made + q);
  }
  for (int64_t head = 0; head < b.heads + b.kv_heads; ++head) {
    float* one = made + head * b.dim;
    if (!b.heads_together) token.norm(head < b.heads ? b.q_norm : b.k_norm, one, b.dim, b.eps_of_heads, one);
    rotate(one, cosines, sines, rotated);
  }
  for (int64_t head = 0; head < b.kv_heads; ++head) {
    const int64_t place = (head * room + tokens) * b.dim * itemsize;
    body->narrow(b.dtype, made + q + head * b.dim, b.dim, static_cast<char*>(keys) + place);
    body->narrow(b.dtype, made + q + kv + head * b.dim, b.dim, static_cast<char*>(values) + place);
  }
  const int64_t cache = room * b.dim * itemsize;
  Heads heads = {*body, {made, b.heads / b.kv_heads, keys, values, b.dtype, tokens + 1, b.dim, b.scaling, attended}, cache, b.kv_heads, 1, 0};
  /* as in dispatch.cc, waking a thread costs about as much as reading 64 KiB */
  const int64_t useful = 1 + 2 * b.kv_heads * (tokens + 1) * b.dim * itemsize / 65536;
  heads.parts = larger(1, useful < threads ? useful : threads);
  if (heads.parts > b.kv_heads) heads.parts = b.kv_heads;
  parallel(heads.parts, attend_part, &heads);
  if (heads.failed) return SECATEURS_NO_MEMORY;
  if (const int32_t wrong = token.multiply(&b.out, 1, attended, normed)) return wrong;
  if (!b.down.count) {
    body->narrow(b.dtype, normed, b.width, y);
    return SECATEURS_OK;
  }
  token.add(b.attention_out_norm, normed, h);

  if (const int32_t wrong = token.multiply(b.gate_up, 2, token.norm(b.mlp_norm, h, b.width, b.eps, normed), made)) return wrong;
  body->gate(b.activation, made, made + b.inner, b.inner);
  if (const int32_t wrong = token.multiply(&b.down, 1, made, normed)) return wrong;
  token.add(b.mlp_out_norm, normed, h);
  body->narrow(b.dtype, h, b.width, y);
  return SECATEURS_OK;
}
