// ops - every elementwise operation as plain loops: what the fast kernels must reproduce bit by
// bit.
//
// Not here: matrix products (matmul.h, packed_matmul.h), attention (attention.h). The tables of
// kernels.h point at these functions for CpuIsa::kPlain.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace tq {

/// exp(x), within 1.5 ulp on [-86, 88]; 0 below, infinity above, NaN for NaN. exp(0) is exactly 1.
float exp_f32(float x);

/// Sum of 16 lanes in the order that all kernels use: halves are added until one is left.
float sum_lanes(const float lanes[kLanes]);

/// sqrt-free part of RMS norm: 1 / sqrt(mean(x^2) + eps), in double, fixed order. [count]
float inverse_rms(const float* x, int64_t count, float eps);

void plain_silu_mul(float* gate, const float* up, int64_t count);
void plain_add(float* x, const float* y, int64_t count);
void plain_scale_gain(const float* x, float factor, const float* gain, int64_t count, float* out);
void plain_rope(float* head, const float* cos, const float* sin, int64_t half);
void plain_round(const RoundJob& job);
int32_t plain_sum_codes(const int8_t* codes, int64_t count);
float plain_exp_sum(float* x, float shift, int64_t count);
void plain_store_half(const float* from, uint16_t* to, int64_t count);
void plain_dequant(int bits, const std::byte* codes, float scale, int64_t count, float* out);

/// cos and sin of one position, each [half]: the angle is the float product pos * inv_freq, as
/// transformers computes it; its cosine is taken in double and rounded, then multiplied by factor.
void rope_angles(int64_t pos, const float* inv_freq, int64_t half, float factor, float* cos,
                 float* sin);

}  // namespace tq
