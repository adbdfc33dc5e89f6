// lane_kernels - every f32 kernel but attention, written once on sixteen lanes.
//
// Included by ops_avx2.cpp and ops_avx512.cpp after the matching lanes_*.h, never elsewhere. Each
// function does to sixteen elements what the plain one in ops.cpp, hadamard.cpp and matmul.cpp does
// to one, operation by operation, so that the bits agree. Read next: span_kernel.h (attention).
#pragma once

#include "cpu/exp_constants.h"
#include "cpu/kernels.h"
#include "cpu/round_scale.h"

namespace tq {
namespace {

Lanes exp_lanes(Lanes x) {
  const Lanes shifted = Lanes::fma(x, Lanes::set(kLog2E), Lanes::set(kRoundMagic));
  const Lanes n = shifted - Lanes::set(kRoundMagic);
  const Lanes r = Lanes::fma(n, Lanes::set(-kLn2Low), Lanes::fma(n, Lanes::set(-kLn2High), x));
  Lanes q = Lanes::set(kExpQ[4]);
  for (int i = 3; i >= 0; --i) q = Lanes::fma(q, r, Lanes::set(kExpQ[i]));
  const Lanes exp_r = Lanes::fma(r * r, q, r) + Lanes::set(1.0f);
  const Lanes result = Lanes::scale_by_low_bits(exp_r, shifted);
  const Lanes bounded = Lanes::select_less(Lanes::set(kExpMax), x, Lanes::set(kInfinity), result);
  return Lanes::select_less(x, Lanes::set(kExpMin), Lanes::zero(), bounded);
}

void lanes_silu_mul(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    const Lanes g = Lanes::load_first(gate + i, n);
    const Lanes silu = g / (Lanes::set(1.0f) + exp_lanes(g * Lanes::set(-1.0f)));
    (silu * Lanes::load_first(up + i, n)).store_first(gate + i, n);
  }
}

void lanes_add(float* x, const float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    (Lanes::load_first(x + i, n) + Lanes::load_first(y + i, n)).store_first(x + i, n);
  }
}

void lanes_scale_gain(const float* x, float factor, const float* gain, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    const Lanes scaled = Lanes::load_first(x + i, n) * Lanes::set(factor);
    (scaled * Lanes::load_first(gain + i, n)).store_first(out + i, n);
  }
}

void lanes_rope(float* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    const Lanes a = Lanes::load_first(head + i, n), b = Lanes::load_first(head + half + i, n);
    const Lanes c = Lanes::load_first(cos + i, n), s = Lanes::load_first(sin + i, n);
    (a * c - b * s).store_first(head + i, n);
    (b * c + a * s).store_first(head + half + i, n);
  }
}

void lanes_round(const RoundJob& job) {
  GroupReach reach = {};
  Lanes largest = Lanes::zero();
  for (int64_t i = 0; i < job.count; i += kLanes) {
    largest = Lanes::max_magnitude(largest, Lanes::load_first(job.x + i, job.count - i));
  }
  reach.largest = largest.max_of_magnitudes();
  if (job.act_codes == ActCodes::kAsymmetric) {
    Lanes above = Lanes::zero(), below = Lanes::zero();
    for (int64_t i = 0; i < job.count; i += kLanes) {
      const Lanes x = Lanes::load_first(job.x + i, job.count - i);
      above = Lanes::max(x, above);  // the second where x is NaN
      below = Lanes::max(Lanes::zero() - x, below);
    }
    reach.above = above.max_of_lanes();
    reach.below = below.max_of_lanes();
  }
  const RoundScale by = round_scale(job, reach);
  *job.scale = by.scale;
  for (int64_t i = 0; i < job.count; i += kLanes) {
    const int64_t n = job.count - i;
    const Lanes scaled = Lanes::load_first(job.x + i, n) * Lanes::set(by.inverse);
    const Lanes low = Lanes::max(scaled, Lanes::set(by.low));
    Lanes::min(low, Lanes::set(by.high)).store_codes_first(job.codes + i, n);
  }
}

int32_t lanes_sum_codes(const int8_t* codes, int64_t count) {
  // In floats, exactly: partial sums stay integers below 2^24 (a lane adds at most 128 a step).
  constexpr int64_t kExactCount = kLanes * ((int64_t{1} << 24) / kLanes / 128);
  int32_t sum = 0;
  int64_t i = 0;
  while (i + kLanes <= count) {
    const int64_t stop = count - i < kExactCount ? count : i + kExactCount;
    Lanes sums = Lanes::zero();
    for (; i + kLanes <= stop; i += kLanes) sums = sums + Lanes::load_codes8(codes + i);
    sum += static_cast<int32_t>(sums.sum());
  }
  for (; i < count; ++i) sum += codes[i];
  return sum;
}

float lanes_exp_sum(float* x, float shift, int64_t count) {
  Lanes sums = Lanes::zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    const Lanes values = exp_lanes(Lanes::load_first(x + i, n) - Lanes::set(shift));
    values.store_first(x + i, n);
    sums = sums + Lanes::keep_first(values, n, Lanes::zero());
  }
  return sums.sum();
}

void lanes_store_half(const float* from, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes::load_first(from + i, count - i).store_f16_first(to + i, count - i);
  }
}

void lanes_dequant(int bits, const std::byte* codes, float scale, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const Lanes values =
        bits == 4 ? Lanes::load_codes4(codes + i / 2) : Lanes::load_codes8(codes + i);
    (Lanes::set(scale) * values).store(out + i);
  }
  for (; i < count; ++i) {
    const int byte = static_cast<int>(codes[bits == 4 ? i / 2 : i]);
    const int code = bits == 8 ? static_cast<int8_t>(byte) : (i % 2 ? byte >> 4 : byte & 15) - 8;
    out[i] = scale * static_cast<float>(code);
  }
}

float lanes_max(const float* x, int64_t count) {
  const Lanes lowest = Lanes::set(-kInfinity);
  Lanes largest = lowest;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) largest = Lanes::max(largest, Lanes::load(x + i));
  if (i < count) {
    const Lanes rest = Lanes::load_first(x + i, count - i);
    largest = Lanes::max(largest, Lanes::keep_first(rest, count - i, lowest));
  }
  return largest.max_of_lanes();
}

double sum_double_lanes(const DoubleLanes& lanes) {
  double sum[kLanes];
  lanes.store(sum);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

double lanes_sum_exp(const float* x, float shift, int64_t count) {
  DoubleLanes sums = DoubleLanes::zero();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    sums.add(exp_lanes(Lanes::load(x + i) - Lanes::set(shift)));
  }
  if (i < count) {
    const Lanes rest = exp_lanes(Lanes::load_first(x + i, count - i) - Lanes::set(shift));
    sums.add(Lanes::keep_first(rest, count - i, Lanes::zero()));
  }
  return sum_double_lanes(sums);
}

double lanes_sum_exp_diff(const float* x, const float* y, float shift, int64_t count) {
  DoubleLanes sums = DoubleLanes::zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t n = count - i;
    const Lanes xs = Lanes::load_first(x + i, n), ys = Lanes::load_first(y + i, n);
    // Behind the last element xs - ys is 0 - 0, but exp(0 - shift) may be infinite.
    const Lanes weighted = exp_lanes(xs - Lanes::set(shift)) * (xs - ys);
    sums.add(Lanes::keep_first(weighted, n, Lanes::zero()));
  }
  return sum_double_lanes(sums);
}

void lanes_merge(float* max, float* sum, float* out, float span_max, float span_sum,
                 const float* span_out, int64_t count) {
  const float new_max = *max < span_max ? span_max : *max;
  const Lanes keep = exp_lanes(Lanes::set(*max - new_max));
  const Lanes take = exp_lanes(Lanes::set(span_max - new_max));
  *max = new_max;
  Lanes::fma(Lanes::set(span_sum), take, Lanes::set(*sum) * keep).store_first(sum, 1);
  for (int64_t i = 0; i < count; i += kLanes) {  // padded_dim is a multiple of 16
    Lanes::fma(Lanes::load(span_out + i), take, Lanes::load(out + i) * keep).store(out + i);
  }
}

void lanes_butterflies(float* v, int64_t count) {
  int64_t half = 1;
  if (count >= kLanes) {
    for (int64_t i = 0; i < count; i += kLanes) Lanes::load(v + i).butterflies().store(v + i);
    half = kLanes;
  }
  for (; half < count; half *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * half) {
      if (half < kLanes) {
        for (int64_t i = begin; i < begin + half; ++i) {
          const float a = v[i], b = v[i + half];
          v[i] = a + b;
          v[i + half] = a - b;
        }
        continue;
      }
      for (int64_t i = begin; i < begin + half; i += kLanes) {
        const Lanes a = Lanes::load(v + i), b = Lanes::load(v + i + half);
        (a + b).store(v + i);
        (a - b).store(v + i + half);
      }
    }
  }
}

// kTo consecutive outputs of the m x m stage, n <= 16 of their elements.
template <int kTo>
void base_tile(const float* v, const float* signs, int64_t m, int64_t inner, int64_t n, float scale,
               float* out) {
  Lanes sums[kTo];
  const Lanes first = Lanes::load_first(v, n);
  for (int j = 0; j < kTo; ++j) sums[j] = Lanes::set(signs[j]) * first;
  for (int64_t from = 1; from < m; ++from) {
    const Lanes x = Lanes::load_first(v + from * inner, n);
    // The product with +-1 is exact: this is an addition or a subtraction.
    for (int j = 0; j < kTo; ++j) {
      sums[j] = Lanes::fma(Lanes::set(signs[from * m + j]), x, sums[j]);
    }
  }
  for (int j = 0; j < kTo; ++j) (sums[j] * Lanes::set(scale)).store_first(out + j * inner, n);
}

void lanes_base_stage(const float* v, const float* signs, int64_t m, int64_t inner, float scale,
                      float* out) {
  for (int64_t i = 0; i < inner; i += kLanes) {
    int64_t to = 0;
    for (; to + 4 <= m; to += 4) {
      base_tile<4>(v + i, signs + to, m, inner, inner - i, scale, out + to * inner + i);
    }
    for (; to < m; ++to) {
      base_tile<1>(v + i, signs + to, m, inner, inner - i, scale, out + to * inner + i);
    }
  }
}

template <DenseType kType>
Lanes load_weights(const std::byte* row, int64_t k) {
  if constexpr (kType == DenseType::kF32) {
    return Lanes::load(reinterpret_cast<const float*>(row + 4 * k));
  } else if constexpr (kType == DenseType::kF16) {
    return Lanes::load_f16(row + 2 * k);
  } else {
    return Lanes::load_bf16(row + 2 * k);
  }
}
template <DenseType kType>
Lanes load_weights_first(const std::byte* row, int64_t k, int64_t n) {
  if constexpr (kType == DenseType::kF32) {
    return Lanes::load_first(reinterpret_cast<const float*>(row + 4 * k), n);
  } else if constexpr (kType == DenseType::kF16) {
    return Lanes::load_f16_first(row + 2 * k, n);
  } else {
    return Lanes::load_bf16_first(row + 2 * k, n);
  }
}

// dense tile - kRows x kTokens outputs
// Work      all partial sums stay in registers over the whole of k; a weight vector is converted
//           once for kTokens uses, a token vector loaded once for kRows uses
// Memory    prefill: kTokens tokens stay in the first-level cache while rows stream from the
// second;
//           decode: every weight byte once, one row after the other: the hardware prefetcher
//           follows one stream and loses four interleaved ones (measured: 22 against 5 GB/s)
// Constants 4 x 6 = 24 accumulators + 4 weights + 1 token of 32 AVX-512 registers;
//           2 x 3 x 2 = 12 of 16 AVX2 registers
template <DenseType kType, int kRows, int kTokens>
void dense_tile(const DenseJob& job, int64_t row, int64_t token) {
  constexpr int64_t kBytes = kType == DenseType::kF32 ? 4 : 2;
  const std::byte* w = job.w + row * job.cols * kBytes;
  const float* x = job.x + token * job.cols;
  Lanes sums[kTokens][kRows], weights[kRows];
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kRows; ++r) sums[t][r] = Lanes::zero();
  }
  int64_t k = 0;
  for (; k + kLanes <= job.cols; k += kLanes) {
    for (int r = 0; r < kRows; ++r) weights[r] = load_weights<kType>(w + r * job.cols * kBytes, k);
    for (int t = 0; t < kTokens; ++t) {
      const Lanes factor = Lanes::load(x + t * job.cols + k);
      for (int r = 0; r < kRows; ++r) sums[t][r] = Lanes::fma(factor, weights[r], sums[t][r]);
    }
  }
  if (k < job.cols) {
    const int64_t n = job.cols - k;
    for (int r = 0; r < kRows; ++r) {
      weights[r] = load_weights_first<kType>(w + r * job.cols * kBytes, k, n);
    }
    for (int t = 0; t < kTokens; ++t) {
      const Lanes factor = Lanes::load_first(x + t * job.cols + k, n);
      for (int r = 0; r < kRows; ++r) sums[t][r] = Lanes::fma(factor, weights[r], sums[t][r]);
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    float* y = job.y + (token + t) * job.y_stride + row;
    if constexpr (kRows == Lanes::kDenseRows) {
      Lanes::store_sums(sums[t], job.accumulate, y);
    } else {
      for (int r = 0; r < kRows; ++r) {
        y[r] = job.accumulate ? y[r] + sums[t][r].sum() : sums[t][r].sum();
      }
    }
  }
}

template <DenseType kType, int kTokens>
void dense_rows(const DenseJob& job, int64_t token) {
  int64_t row = job.row_begin;
  if constexpr (kTokens > 1) {
    for (; row + Lanes::kDenseRows <= job.row_end; row += Lanes::kDenseRows) {
      dense_tile<kType, Lanes::kDenseRows, kTokens>(job, row, token);
    }
  }
  for (; row < job.row_end; ++row) dense_tile<kType, 1, kTokens>(job, row, token);
}

template <DenseType kType>
void dense_of_type(const DenseJob& job) {
  constexpr int kFull = Lanes::kDenseTokens;
  int64_t token = job.token_begin;
  for (; token + kFull <= job.token_end; token += kFull) dense_rows<kType, kFull>(job, token);
  switch (job.token_end - token) {
    case 5:
      dense_rows<kType, kFull == 6 ? 5 : 1>(job, token);
      break;
    case 4:
      dense_rows<kType, kFull == 6 ? 4 : 1>(job, token);
      break;
    case 3:
      dense_rows<kType, kFull == 6 ? 3 : 1>(job, token);
      break;
    case 2:
      dense_rows<kType, 2>(job, token);
      break;
    case 1:
      dense_rows<kType, 1>(job, token);
      break;
  }
}

void lanes_dense(const DenseJob& job) {
  switch (job.type) {
    case DenseType::kF32:
      return dense_of_type<DenseType::kF32>(job);
    case DenseType::kF16:
      return dense_of_type<DenseType::kF16>(job);
    case DenseType::kBF16:
      return dense_of_type<DenseType::kBF16>(job);
  }
}

}  // namespace
}  // namespace tq
