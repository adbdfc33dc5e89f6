// resume - results of finished layers, kept beside the output until it is complete.
//
// OUT.resume/ holds fingerprint.json (what the results depend on), learned.bin, layer-00000.bin ...
// Each appears atomically, so a killed run leaves only whole files. A file is: "TQLAYER2", the
// length of a JSON description (u64), the description, the arrays it names in order, XXH3-64 of all
// that.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "quant/learn.h"
#include "quant/quantize_layer.h"

namespace tq {

class ResumeStore {
 public:
  /// `output` is the .tq being made; its resume folder is output + ".resume".
  explicit ResumeStore(const std::string& output);
  const std::string& folder() const { return folder_; }
  bool exists() const;

  /// Throws kBadData "resume data does not match: FIELD" when the stored fingerprint differs.
  void check(const Json& fingerprint) const;
  /// Starts a new folder; an old one is removed first.
  void create(const Json& fingerprint);
  void save(int64_t layer, const QuantizedLayer& result) const;
  /// Result of a layer, or nothing if it was not finished. Throws kBadData when damaged.
  /// Transforms are not stored: `down` is set as the input of w_down where the file says so.
  std::optional<QuantizedLayer> load(int64_t layer, const Transform& down) const;
  /// What learn.h found, bit for bit.
  void save_learned(const LearnResult& learned) const;
  std::optional<LearnResult> load_learned() const;
  void remove() const;

 private:
  std::string layer_path(int64_t layer) const;
  std::string folder_;
};

}  // namespace tq
