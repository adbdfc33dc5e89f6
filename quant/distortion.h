// distortion - what rounding did to each linear, in decibels and bits.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "model/json.h"
#include "quant/gptq.h"
#include "quant/owned.h"

namespace tq {

struct LinearReport {
  std::string name;
  int64_t out = 0, in = 0;
  double bits_per_weight = 0;           // weight, scales and branch
  double weight_snr_db = 0;             // 10 log10(|W|^2 / |W - W'|^2); infinity when exact
  std::optional<double> output_snr_db;  // the same for x W^T over the calibration tokens
  double clipped = 0;                   // fraction of weights outside the range of codes
  bool refined = false;                 // the scales have changed since the ratios were measured
};

/// Compares a linear as stored with the weight it stands for (in the same basis, and after the
/// correction for rounded inputs where there is one). gram: inputs of the linear, or null.
LinearReport measure_linear(const std::string& name, const FloatMatrix& w,
                            const OwnedLinear& stored, int64_t n_clipped, const Gram* gram,
                            int threads);

/// Infinite ratios become null: JSON has no infinity. Those from before a refinement of the scales
/// are in "before_refinement": what ships has none, because its inputs are not kept.
Json to_json(const LinearReport& report);
LinearReport report_from_json(const Json& json);

/// Decibels for a person: "18.3", or "exact".
std::string decibels(double value);

}  // namespace tq
