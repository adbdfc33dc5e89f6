// preflight - everything that can be refused before hours of work are spent, and the plan's sizes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "model/weights.h"
#include "quant/options.h"

namespace tq {

/// Sizes known before any work; bytes.
struct QuantizePlan {
  int64_t n_linear_weights = 0;
  uint64_t linear_bytes = 0;  // all linears with their branches, and learned bases
  uint64_t table_bytes = 0;   // embedding and, if separate, head
  uint64_t output_bytes = 0;  // whole file, to about a percent (the JSON header is estimated)
  uint64_t resume_bytes = 0;  // finished layers kept until the end
  uint64_t memory_bytes = 0;  // peak resident memory, an upper estimate
  double bits_per_weight() const {
    return 8.0 * static_cast<double>(linear_bytes) / static_cast<double>(n_linear_weights);
  }
};
/// n_tokens: calibration tokens, 0 without calibration.
QuantizePlan make_plan(const Model& model, const QuantizeOptions& options, int64_t n_tokens);

/// Throws kIo when `output` cannot become a file of ours: it exists and !force, is a folder, its
/// folder is missing or not writable, or it is one of `inputs` (by inode: links count).
void check_output_path(const std::string& output, const std::vector<std::string>& inputs,
                       bool force);
/// Throws kIo when the file system of `output` has less than `bytes` free.
void check_disk_space(const std::string& output, uint64_t bytes);
/// Throws kResource when the estimate exceeds what the machine or its control group has left.
void check_memory(uint64_t bytes);
/// Bytes of memory available to this process; UINT64_MAX when unknown.
uint64_t available_memory();

/// Reads every weight once. Throws kBadData naming tensor, count and first index of values that are
/// not finite. Returns a hash of all weights. `done_with` is called with each matrix after use.
uint64_t scan_weights(const Model& model, const std::function<void(const Matrix&)>& done_with);

/// Dense matrices of a layer-wise model with our names: table, head (if separate), linears.
void for_each_matrix(const Model& model,
                     const std::function<void(const std::string&, const Matrix&)>& visit);

}  // namespace tq
