// pipeline - a whole model, layer by layer, into one .tq file.
//
// For each layer: load in f32 -> fold into the basis -> (calibrate) -> round -> write. One layer is
// in memory at a time. Everything here is independent of the number of threads: same input,
// options, seed and device of the calibration give the same bytes. Read pipeline.cpp, then
// quantize_layer.h.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "model/atomic_file.h"
#include "model/backend.h"
#include "quant/calibrate.h"
#include "quant/distortion.h"
#include "quant/options.h"
#include "quant/refine.h"

namespace tq {

/// What the caller wants to hear, and may refuse. All optional.
struct QuantizeHooks {
  std::function<void(const std::string& sentence)> note;
  /// A step of layer `layer` of `n_layers` begins; "" when the layer is done.
  std::function<void(int64_t layer, int64_t n_layers, const char* step)> progress;
  /// After step `step` of `n_steps` of a descent, "learning" or "refining", with its loss.
  std::function<void(const char* stage, int64_t step, int64_t n_steps, double loss)> descent;
  /// True ends the work with Error(kInterrupted) within one calibration sample or linear.
  std::function<bool()> interrupted;
  /// A matrix of the source will not be read again soon (drop its mapped pages).
  std::function<void(const Matrix&)> done_with;
  /// The file is complete and stands under this temporary name; an exception keeps it from
  /// appearing.
  std::function<void(const std::string& path)> try_file;
};

struct QuantizeResult {
  std::vector<LinearReport> linears;
  uint64_t file_bytes = 0;
  double bits_per_weight = 0;        // of all linears, low-rank steps included
  int64_t n_resumed = 0;             // layers taken from an interrupted run
  Json quantization;                 // as stored in the file, but for the distortion
  std::vector<double> basis_losses;  // one a step
  RefineResult refined;              // no losses without refinement
};

/// Quantizes `source` into `output`. calibration: required when options.needs_calibration(). The
/// results of finished layers are kept in output + ".resume" until the file is complete; with
/// `resume` they are used again, after a check that model, options and calibration are the same.
/// Files there that are damaged, or of another run, are made again. Throws kIo while another run
/// makes the same output, or when a file of the source has changed since it was opened.
/// weights_hash: scan_weights(source). Preflight checks are the caller's (preflight.h).
QuantizeResult quantize_model(const Model& source, const QuantizeOptions& options,
                              const Calibration* calibration, uint64_t weights_hash,
                              Backend& backend, const std::string& output, bool resume,
                              const QuantizeHooks& hooks, Replace replace = Replace::kAllowed);

}  // namespace tq
