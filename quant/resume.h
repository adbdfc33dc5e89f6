// resume - results of finished layers, kept beside the output until it is complete.
//
// OUT.resume/ holds fingerprint.json (what the results depend on), learning.bin (the state of a
// descent, while a basis is learned), learned.bin, layer-00000.bin ... Each appears atomically, so
// a killed run leaves only whole files. A file is: "TQLAYER3", the length of a JSON description
// (u64), the description, the arrays it names in order, XXH3-64 of all that. The description says
// which file of which run it is, so that one in the place of another is found. One run at a time
// has the folder: it holds a lock.
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
  ~ResumeStore();  // lets the folder go, and removes it if nothing was kept
  ResumeStore(const ResumeStore&) = delete;
  ResumeStore& operator=(const ResumeStore&) = delete;
  const std::string& folder() const { return folder_; }
  bool exists() const;

  /// Takes the folder for this run, and makes it. Throws kIo while another run has it.
  void lock();
  /// Throws kIo if a run is making `output` just now. lock() decides; this only looks, early.
  static void refuse_second_run(const std::string& output);
  /// Bytes of the files that an earlier run left for `output`.
  static uint64_t held_bytes(const std::string& output);

  /// Throws kBadData "resume data does not match: FIELD" when the stored fingerprint differs.
  void check(const Json& fingerprint);
  /// Starts a new folder; what an old one held is removed first.
  void create(const Json& fingerprint);
  void save(int64_t layer, const QuantizedLayer& result) const;
  /// Result of a layer, or nothing if it was not finished. Throws kBadData when damaged, or of
  /// another layer or run. Transforms are not stored: `down` is set as the input of w_down where
  /// the file says so.
  std::optional<QuantizedLayer> load(int64_t layer, const Transform& down) const;
  /// What learn.h found, bit for bit. The state of its descent is not needed any more then.
  void save_learned(const LearnResult& learned) const;
  std::optional<LearnResult> load_learned() const;
  /// The state of a descent (learn.h). check_learning(): whether there is one; throws as load().
  void save_learning(const Transfer& transfer) const;
  bool check_learning() const;
  void load_learning(const Transfer& transfer) const;
  /// What is kept, in words; "" if nothing is.
  std::string contents() const;
  void remove() const;

 private:
  void bind(const Json& fingerprint);
  Json binding(const std::string& what) const;
  void remove_files() const;
  static std::string layer_name(int64_t layer);
  std::string folder_, run_;  // run_: a hash of the fingerprint
  int fd_ = -1;               // of the folder, locked
};

}  // namespace tq
