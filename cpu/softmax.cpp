// softmax - see softmax.h: the plain kernels, and what is made of them.
#include "cpu/softmax.h"

#include <algorithm>
#include <cmath>

#include "cpu/ops.h"
#include "model/error.h"

namespace tq {

float plain_max(const float* x, int64_t count) {
  float largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) largest = largest > x[i] ? largest : x[i];
  return largest;
}

double sum_lanes(const double lanes[kLanes]) {
  double sum[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) sum[i] = lanes[i];
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

double plain_sum_exp(const float* x, float shift, int64_t count) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] += exp_f32(x[i] - shift);
  return sum_lanes(lanes);
}

double plain_sum_exp_diff(const float* x, const float* y, float shift, int64_t count) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] += exp_f32(x[i] - shift) * (x[i] - y[i]);
  return sum_lanes(lanes);
}

double log_sum_exp(const Kernels& kernels, std::span<const float> logits) {
  const int64_t count = static_cast<int64_t>(logits.size());
  const float top = kernels.max(logits.data(), count);
  return static_cast<double>(top) + std::log(kernels.sum_exp(logits.data(), top, count));
}

// sum p (log p - log q) = sum p (p_logit - q_logit) + log Z_q - log Z_p, with p = exp(p_logit) /
// Z_p.
double kl_divergence(const Kernels& kernels, std::span<const float> p_logits,
                     std::span<const float> q_logits) {
  TQ_CHECK(p_logits.size() == q_logits.size());
  const int64_t count = static_cast<int64_t>(p_logits.size());
  const float top = kernels.max(p_logits.data(), count);
  const double sum = kernels.sum_exp(p_logits.data(), top, count);
  const double weighted = kernels.sum_exp_diff(p_logits.data(), q_logits.data(), top, count) / sum;
  return weighted + log_sum_exp(kernels, q_logits) - (static_cast<double>(top) + std::log(sum));
}

int64_t index_of_max(const Kernels& kernels, std::span<const float> logits) {
  const float top = kernels.max(logits.data(), static_cast<int64_t>(logits.size()));
  return std::find(logits.begin(), logits.end(), top) - logits.begin();
}

}  // namespace tq
