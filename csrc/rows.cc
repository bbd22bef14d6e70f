/* Rows of a matrix of integers as numbers: what an embedding looks up. */
#include "secateurs.h"

namespace {
#include "number.h"
}

extern "C" int32_t secateurs_rows(const secateurs_weight* weight, const int64_t* rows, int64_t count, int32_t dtype, void* out) {
  const secateurs_weight& w = *weight;
  if (w.mask || w.bits < 2 || w.bits > 8 || !w.scale || dtype < SECATEURS_BF16 || dtype > SECATEURS_FP32) return SECATEURS_BAD_ARGUMENT;
  const int64_t words = (w.inputs + SECATEURS_WORD - 1) / SECATEURS_WORD, run = SECATEURS_WORD / 8 * w.bits;
  const int64_t groups = w.group ? (w.inputs + w.group - 1) / w.group : 1, wide = w.group ? w.group : w.inputs;
  const uint32_t low = (1u << w.bits) - 1;
  for (int64_t t = 0; t < count; ++t) {
    if (rows[t] < 0 || rows[t] >= w.outputs) return SECATEURS_BAD_ARGUMENT;
    const int64_t panel = rows[t] / SECATEURS_PANEL, row = rows[t] % SECATEURS_PANEL;
    float factor = 0;
    int32_t zero = 0;
    for (int64_t i = 0; i < w.inputs; ++i) {
      if (i % wide == 0) {
        const int64_t at = (panel * groups + i / wide) * SECATEURS_PANEL + row;
        factor = w.half ? fp16_to_float(w.scale[at]) : bf16_to_float(w.scale[at]);
        zero = w.zero ? w.zero[at] : 1 << (w.bits - 1);
      }
      const int64_t bit = i % SECATEURS_WORD * w.bits;
      const uint8_t* from = static_cast<const uint8_t*>(w.values) + ((panel * words + i / SECATEURS_WORD) * SECATEURS_PANEL + row) * run + bit / 8;
      /* a code may lie across two bytes; after the last run there are bytes that a load may touch */
      const uint32_t code = (from[0] | static_cast<uint32_t>(from[1]) << 8) >> bit % 8 & low;
      /* adding a positive zero makes every zero positive */
      const float number = static_cast<float>(static_cast<int32_t>(code) - zero) * factor + 0.0f;
      const int64_t to = t * w.inputs + i;
      if (dtype == SECATEURS_FP32)
        static_cast<float*>(out)[to] = number;
      else
        static_cast<uint16_t*>(out)[to] = dtype == SECATEURS_BF16 ? bf16_from_float(number) : fp16_from_float(number);
    }
  }
  return SECATEURS_OK;
}
