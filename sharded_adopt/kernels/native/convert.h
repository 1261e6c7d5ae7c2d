/* 16-bit floats to and from fp32, in integer arithmetic that every instruction set runs alike and compilers vectorise.
 *
 * No step goes through a subnormal fp32 number, so a thread that flushes subnormals to zero gets the same bits.
 */
#ifndef SHARDED_ADOPT_CONVERT_H
#define SHARDED_ADOPT_CONVERT_H

#include <stdint.h>
#include <string.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))

static ALWAYS_INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static ALWAYS_INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static ALWAYS_INLINE float float_of_bf16(uint16_t x) {
    return float_of((uint32_t)x << 16);
}

/* to nearest, ties to even; a NaN becomes torch's quiet NaN */
static ALWAYS_INLINE uint16_t bf16_of_float(float x) {
    uint32_t bits = bits_of(x);
    uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : nearest);
}

static ALWAYS_INLINE float float_of_half(uint16_t x) {
    uint32_t sign = (uint32_t)(x & 0x8000u) << 16, magnitude = x & 0x7fffu;
    uint32_t normal = (magnitude << 13) + (112u << 23);
    uint32_t infinite = (magnitude << 13) | 0x7f800000u; /* infinity and NaN keep their mantissa */
    uint32_t subnormal = bits_of(float_of(0x3f000000u | magnitude) - 0.5f);
    /* 0x3f000000 | magnitude is 0.5 + magnitude * 2^-24; the difference is exact */
    uint32_t bits = magnitude >= 0x7c00u ? infinite : normal;
    bits = magnitude < 0x0400u ? subnormal : bits;
    return float_of(sign | bits);
}

/* to nearest, ties to even */
static ALWAYS_INLINE uint16_t half_of_float(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    /* below 2^-14 the sum with 0.5 rounds to multiples of 2^-24, which is what a subnormal half counts */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    return (uint16_t)(sign | half);
}

/* 16 bits that look random, from nothing but the element's index in its parameter and the step. What is equal for all
 * elements whose indices share their upper half goes into `base`. */
static ALWAYS_INLINE uint32_t rounding_base(uint64_t index, uint32_t step) {
    return (uint32_t)(index >> 32) * 0xC2B2AE3Du + step * 0x85EBCA77u + 0x27D4EB2Fu;
}

static ALWAYS_INLINE uint32_t rounding_bits(uint32_t low, uint32_t base) {
    uint32_t h = low * 0x9E3779B1u + base;
    h ^= h >> 16;
    h *= 0x7FEB352Du;
    h ^= h >> 15;
    h *= 0x846CA68Bu;
    h ^= h >> 16;
    return h >> 16;
}

/* to one of the two neighbours, nearer ones more often; infinity and NaN stay what they are */
static ALWAYS_INLINE uint16_t bf16_of_float_stochastic(float x, uint32_t random) {
    uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    uint32_t special = magnitude > 0x7f800000u ? 0x7fc0u : bits >> 16;
    return (uint16_t)(magnitude >= 0x7f800000u ? special : (bits + random) >> 16);
}

/* The same on half's grid, which is even below 2^-14; what is finite stays finite. Choices are made with masks: written as
 * conditions they stay branches, and the loop stays scalar. */
static ALWAYS_INLINE uint16_t half_of_float_stochastic(float x, uint32_t random) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    uint32_t is_small = 0u - (uint32_t)(magnitude < 0x38800000u), is_special = 0u - (uint32_t)(magnitude >= 0x7f800000u);
    uint32_t normal = (magnitude + (random >> 3) - (112u << 23)) >> 13;
    normal = normal > 0x7bffu ? 0x7bffu : normal;
    /* below: a count of 2^-24 and its fraction, which is compared rather than added, so that nothing is rounded */
    float units = float_of(magnitude & is_small) * 16777216.0f;
    int32_t whole = (int32_t)units;
    uint32_t up = (units - (float)whole) * 65536.0f >= (float)(65536 - (int32_t)random);
    uint32_t finite = (((uint32_t)whole + up) & is_small) | (normal & ~is_small);
    uint32_t special = 0x7c00u | (uint32_t)(magnitude > 0x7f800000u) << 9;
    return (uint16_t)(sign | (special & is_special) | (finite & ~is_special));
}

#endif
