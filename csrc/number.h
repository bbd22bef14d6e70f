/* Conversions of bf16 and fp16, for CPUs without instructions for them. Included inside an anonymous namespace. */

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float out;
  __builtin_memcpy(&out, &wide, 4);
  return out;
}

/* round to nearest, ties to even; NaN stays NaN */
inline uint16_t bf16_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  uint32_t bits;
  float out;
  if (exponent == 0) {
    /* zero or subnormal: fraction * 2^-24 */
    out = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &out, 4);
    bits |= sign;
  } else {
    bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
  }
  __builtin_memcpy(&out, &bits, 4);
  return out;
}

inline uint16_t fp16_from_float(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | (bits >> 13 & 0x3ff));
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {
    /* below the least normal number: adding 0.5 rounds at the last place of a subnormal fp16 */
    float magnitude, shifted;
    __builtin_memcpy(&magnitude, &bits, 4);
    shifted = magnitude + 0.5f;
    __builtin_memcpy(&bits, &shifted, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits >> 13) - (112 << 10)));
}
