// ops - see ops.h.
#include "cpu/ops.h"

#include <bit>
#include <cmath>

#include "cpu/exp_constants.h"
#include "cpu/round_scale.h"
#include "model/tensor.h"

namespace tq {

float exp_f32(float x) {
  if (x < kExpMin) return 0.0f;
  if (x > kExpMax) return kInfinity;
  const float shifted = std::fma(x, kLog2E, kRoundMagic);
  const float n = shifted - kRoundMagic;
  const float r = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, x));
  float q = kExpQ[4];
  for (int i = 3; i >= 0; --i) q = std::fma(q, r, kExpQ[i]);
  const float exp_r = std::fma(r * r, q, r) + 1.0f;
  // Adding n to the exponent field multiplies by 2^n; all other bits of `shifted` leave at the top.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(exp_r) +
                              (std::bit_cast<uint32_t>(shifted) << 23));
}

float sum_lanes(const float lanes[kLanes]) {
  float sum[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) sum[i] = lanes[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

float inverse_rms(const float* x, int64_t count, float eps) {
  // Eight chains: one chain of additions would wait four cycles for each of them.
  double squares[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int64_t j = 0; j < 8; ++j) {
      squares[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
    }
  }
  for (int64_t j = 0; i + j < count; ++j) {
    squares[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
  }
  const double sum = ((squares[0] + squares[4]) + (squares[2] + squares[6])) +
                     ((squares[1] + squares[5]) + (squares[3] + squares[7]));
  return static_cast<float>(1.0 /
                            std::sqrt(sum / static_cast<double>(count) + static_cast<double>(eps)));
}

void plain_silu_mul(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    gate[i] = gate[i] / (1.0f + exp_f32(-gate[i])) * up[i];
  }
}

void plain_add(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) x[i] += y[i];
}

void plain_scale_gain(const float* x, float factor, const float* gain, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor * gain[i];
}

void plain_rope(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[i + half];
    head[i] = a * cos[i] - b * sin[i];
    head[i + half] = b * cos[i] + a * sin[i];
  }
}

void rope_angles(int64_t pos, const float* inv_freq, int64_t half, float factor, float* cos,
                 float* sin) {
  for (int64_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(static_cast<float>(pos) * inv_freq[i]);
    cos[i] = static_cast<float>(std::cos(angle)) * factor;
    sin[i] = static_cast<float>(std::sin(angle)) * factor;
  }
}

void plain_round(const RoundJob& job) {
  // The bit pattern of |x| orders like |x|, with NaN above infinity: a NaN in the group becomes its
  // scale and reaches the output instead of being rounded away.
  uint32_t largest = 0;
  float above = 0, below = 0;
  for (int64_t i = 0; i < job.count; ++i) {
    const float x = job.x[i];
    const uint32_t bits = std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu;
    largest = bits > largest ? bits : largest;
    above = x > above ? x : above;
    below = -x > below ? -x : below;
  }
  const RoundScale by = round_scale(job, {std::bit_cast<float>(largest), above, below});
  *job.scale = by.scale;
  for (int64_t i = 0; i < job.count; ++i) {
    const float scaled = job.x[i] * by.inverse;
    const float low = scaled > by.low ? scaled : by.low;  // also the answer for NaN
    const float bounded = low < by.high ? low : by.high;
    // Ties to even; |bounded| is far below 2^22, where this is exact.
    job.codes[i] = static_cast<int8_t>((bounded + kRoundMagic) - kRoundMagic);
  }
}

int32_t plain_sum_codes(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += codes[i];
  return sum;
}

float plain_exp_sum(float* x, float shift, int64_t count) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) {
    x[i] = exp_f32(x[i] - shift);
    lanes[i % kLanes] += x[i];
  }
  return sum_lanes(lanes);
}

void plain_store_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = f32_to_f16(from[i]);
}

void plain_dequant(int bits, const std::byte* codes, float scale, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    const int byte = static_cast<int>(codes[bits == 4 ? i / 2 : i]);
    const int code = bits == 8 ? static_cast<int8_t>(byte) : (i % 2 ? byte >> 4 : byte & 15) - 8;
    out[i] = scale * static_cast<float>(code);
  }
}

}  // namespace tq
