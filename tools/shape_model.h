// shape_model - models of a known shape with random weights, for `tq bench --shape`: speed without
// a download. What they say is noise.
#pragma once

#include <string>
#include <vector>

#include "model/weights.h"

namespace tq {

/// How the linears of a shape are stored: 4-bit weights (16: bf16), rounded inputs, a component of
/// low rank.
struct ShapeOptions {
  int bits_w = 4, bits_a = 4, head_bits = 8;
  int64_t group = 64, rank = 0;
  bool two_level = false;  // scales of inputs (model/weights.h, ActQuant)
};

/// Names that random_model() knows.
std::vector<std::string> shape_names();

/// All matrices are views of one random buffer: a backend copies them, so the device reads as many
/// bytes as for a real model. Throws kUsage for an unknown name.
Model random_model(const std::string& shape, const ShapeOptions& options);

}  // namespace tq
