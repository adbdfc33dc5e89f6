// softmax - figures of rows of logits: log-sum-exp, KL divergence, the most likely id.
//
// For evaluation, where a vocabulary of 50,000 to 150,000 ids for each token is a visible part of
// the time. Exponentials in f32 (ops.h, exp_f32), sums in double on 16 lanes (element k belongs to
// lane k % 16), so every instruction set gives the same bits. Masked ids (-inf, or a padded
// vocabulary) count as probability 0 in log_sum_exp; kl_divergence wants them cut off.
// Not here: the softmax of attention (attention.h), sampling (model/sampler.h).
#pragma once

#include <span>

#include "cpu/kernels.h"

namespace tq {

/// log(sum(exp(logits))) around the maximum; error below 1e-6 for |logits| below 100.
double log_sum_exp(const Kernels& kernels, std::span<const float> logits);

/// KL(p || q) in nats of the two softmaxes, same ids, finite logits.
double kl_divergence(const Kernels& kernels, std::span<const float> p_logits,
                     std::span<const float> q_logits);

/// Id of the largest logit, the lowest one on ties.
int64_t index_of_max(const Kernels& kernels, std::span<const float> logits);

float plain_max(const float* x, int64_t count);
double plain_sum_exp(const float* x, float shift, int64_t count);
double plain_sum_exp_diff(const float* x, const float* y, float shift, int64_t count);

/// Sum of 16 lanes in double: halves are added until one is left.
double sum_lanes(const double lanes[kLanes]);

}  // namespace tq
