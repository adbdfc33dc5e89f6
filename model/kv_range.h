// kv_range - powers of two that keep keys and values inside the range of f16.
//
// Caches of 16 bits and less, and attention on a GPU at any width, hold keys and values in f16 or
// as codes with f16 scales. What a layer can put out at most follows from its weights, because the
// norm before them bounds their input. Where that bound is out of f16's comfortable range, as in
// no ordinary model, keys are stored times 2^-e and queries multiplied by 2^e, values stored times
// 2^-e and attention's output multiplied by 2^e: the same function, exactly.
// Not here: where the factors are applied (forward.cpp). Read next: kv_range.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "model/weights.h"

namespace tq {

/// Exponents of what the outputs of wq, wk and wv, and attention's output, are multiplied by.
/// Empty: nothing. With norms of q and k, those of q and k belong to what the norms put out; they
/// are the same for every head then.
struct KvExponents {
  std::vector<int> q, k, v, out;  // [q_dim], [kv_dim], [kv_dim], [q_dim]
};

/// Costs a look at every scale of packed wq, wk and wv, or at every element of dense ones.
KvExponents kv_exponents(const Config& config, const Layer& layer);

}  // namespace tq
