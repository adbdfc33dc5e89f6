// pipeline - the loop over layers. See pipeline.h; read Pipeline::run() first.
#include "quant/pipeline.h"

#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <optional>

#include "model/error.h"
#include "model/tq_file.h"
#include "quant/eigen.h"
#include "quant/learn.h"
#include "quant/magnitude.h"
#include "quant/quantize_layer.h"
#include "quant/resume.h"
#include "quant/rounding.h"

namespace tq {
namespace {

using Clock = std::chrono::steady_clock;

constexpr Clock::duration kKeepEvery = std::chrono::seconds(1);  // of learning, at most

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

// Sums of a GPU differ from the CPU's in their last bits, and so does what follows from them.
void add_device(Json& json, const Backend& backend) {
  if (backend.name().starts_with("cuda")) json["calib_device"] = "cuda";
}

// What the results of a layer depend on. A field more is safe, a field less is a wrong file.
Json make_fingerprint(const Model& source, const QuantizeOptions& options,
                      const Calibration* calibration, uint64_t weights_hash,
                      const Backend& backend) {
  Json json;
  json["format"] = kTqFormatVersion;
  json["weights"] = hex(weights_hash);
  json["config"] = hex(XXH3_64bits(source.texts.config.data(), source.texts.config.size()));
  const Json described = describe_options(options);
  for (const auto& item : described.items()) json[item.key()] = item.value();
  if (calibration) {
    json["calibration"] = hex(calibration->hash());
    add_device(json, backend);
  }
  return json;
}

// What `tq inspect` shows of a report. Three decimals, so that the last bits of a logarithm, which
// no library promises, are not part of the file.
Json distortion_json(const LinearReport& report) {
  const std::function<Json(const Json&)> rounded = [&](const Json& all) {
    Json json;
    for (const char* key : {"before_refinement", "weight_snr_db", "output_snr_db", "clipped"}) {
      if (!all.contains(key)) continue;
      json[key] = all[key].is_object() ? rounded(all[key])
                  : all[key].is_null() ? Json(nullptr)  // exact
                                       : Json(std::round(1000 * all[key].get<double>()) / 1000);
    }
    return json;
  };
  return rounded(to_json(report));
}

// Embedding or head: the source's own 16 bits, f32 only if asked for or needed, or rounded to
// nearest. They have no exponents, since the embedding may be both: where more than a few rows
// (tokens that were never trained may be anything) need them, it stays in 16 bits.
struct Table {
  Table(const Matrix& source, int bits, const QuantizeOptions& options) {
    FloatMatrix values;
    if (bits < 16 || source.storage == Storage::kF32) values = to_float_matrix(source);
    if (bits < 16) {
      const std::vector<int8_t> exponents =
          row_exponents(values, {bits, options.group}, {}, options.threads, kFewRows);
      kept = !exponents.empty();
      if (kept) bits = 16;
    }
    if (bits < 16) {
      owned = round_matrix(values, {bits, options.group}, nullptr, options.threads).matrix;
    } else if (source.storage == Storage::kF32 && bits == 16) {
      owned = store_dense(values.data, values.rows, values.cols, choose_16_bit(values.data));
    } else {
      matrix = source;
      return;
    }
    matrix = owned.view();
  }
  Table(const Table&) = delete;
  static constexpr double kFewRows = 1.0 / 16;
  OwnedMatrix owned;  // empty when the source's bytes are used as they are
  Matrix matrix;
  bool kept = false;  // in 16 bits, though fewer were asked for
};

class Pipeline {
 public:
  Pipeline(const Model& source, const QuantizeOptions& options, const QuantizeHooks& hooks,
           const std::string& output, Replace replace)
      : source_(source),
        options_(options),
        hooks_(hooks),
        basis_(options, source.config),
        store_(output),
        writer_(output, replace) {}

  QuantizeResult run(const Calibration* calibration, const Json& fingerprint, Backend& backend,
                     bool resume) {
    try {
      return run_stages(calibration, fingerprint, backend, resume);
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kInterrupted) throw;
      const std::string kept = keeps_results_ ? store_.contents() : "";
      if (kept.empty()) {
        throw Error(ErrorKind::kInterrupted, "interrupted", "tq quantize",
                    "nothing was finished, and nothing is kept");
      }
      throw Error(ErrorKind::kInterrupted, "interrupted", "tq quantize",
                  "kept in " + store_.folder() + ": " + kept, "continue with --resume");
    }
  }

 private:
  QuantizeResult run_stages(const Calibration* calibration, const Json& fingerprint,
                            Backend& backend, bool resume) {
    TQ_CHECK(calibration || !options_.needs_calibration());
    note(basis_.fallback_note(source_.config));
    if (calibration) prepare_store(fingerprint, resume);
    if (options_.learns_basis()) learn(*calibration, backend);
    write_tables();
    std::optional<CalibrationStream> stream;
    const int64_t n_layers = source_.config.n_layers;
    int64_t pending = 0;  // layers whose results are known but which the stream has not passed
    const auto catch_up = [&](int64_t layer) {
      if (calibration && !stream) {
        step(layer, "embedding");
        stream.emplace(source_, *calibration, basis_.input(), backend, options_.threads);
      }
      for (; stream && pending < layer; ++pending) {
        step(pending, "replaying");
        stream->run_layer(folded(pending).view(), nullptr, [&] { check_interrupted(); });
      }
    };
    for (int64_t layer = 0; layer < n_layers; ++layer) {
      if (options_.copies_weights()) {
        copy_layer(layer);
      } else if (!take_finished(layer)) {
        catch_up(layer);
        work_on_layer(layer, stream ? &*stream : nullptr);
        pending = layer + 1;
      }
      release_layer(layer);
      step(layer, "");
    }
    if (options_.refine_steps > 0) {
      catch_up(n_layers);
      refine(*calibration, stream->hidden());
    }
    finish(calibration, backend);
    return std::move(result_);
  }

  void note(const std::string& sentence) const {
    if (hooks_.note && !sentence.empty()) hooks_.note(sentence);
  }
  void step(int64_t layer, const char* name) const {
    if (hooks_.progress) hooks_.progress(layer, source_.config.n_layers, name);
  }
  void check_interrupted() const {
    if (!hooks_.interrupted || !hooks_.interrupted()) return;
    throw Error(ErrorKind::kInterrupted, "interrupted", "tq quantize", "stopped");
  }
  // Work on what is no longer the model whose fingerprint was taken must not be kept.
  void check_source() const {
    if (source_.check_unchanged) source_.check_unchanged();
  }
  // What an earlier run left, or nothing, with a note, where that is damaged.
  template <typename Load>
  auto unless_damaged(const Load& load) const -> decltype(load()) {
    try {
      return load();
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::kBadData) throw;
      note(std::string(error.what()) + ": it is made again");
      return {};
    }
  }

  void prepare_store(const Json& fingerprint, bool resume) {
    store_.lock();
    keeps_results_ = true;
    if (resume && store_.exists()) {
      store_.check(fingerprint);
      resuming_ = true;
      return;
    }
    if (resume) note("nothing to resume in " + store_.folder() + ", starting from the beginning");
    if (!resume && store_.exists()) {
      note("discarding the unfinished work in " + store_.folder() + " (--resume would use it)");
    }
    store_.create(fingerprint);
  }

  void learn(const Calibration& calibration, Backend& backend) {
    std::optional<LearnResult> learned;
    if (resuming_) learned = unless_damaged([&] { return store_.load_learned(); });
    if (!learned) {
      const auto stop = [&] { check_interrupted(); };
      const bool begun = resuming_ && unless_damaged([&] { return store_.check_learning(); });
      std::optional<InputBank> bank;
      if (!options_.learns_from_predictions()) {
        bank.emplace(source_, calibration, basis_.down(), backend, options_.threads,
                     [&](int64_t layer) {
                       stop();
                       if (layer > 0) release_layer(layer - 1);
                       step(layer, "sampling");
                     });
      }
      const LearnHooks hooks{
          [&](int64_t step, int64_t n_steps, double loss) {
            if (hooks_.descent) hooks_.descent("learning", step, n_steps, loss);
          },
          stop, [&](int64_t layer) { release_layer(layer); },
          [&](const Transfer& transfer) {
            if (begun) store_.load_learning(transfer);
            return begun;
          },
          [&](const Transfer& transfer, bool leaving) { keep_learning(transfer, leaving); }};
      next_keep_ = Clock::now() + kKeepEvery;
      learned = learn_basis({source_, calibration, bank ? &*bank : nullptr, basis_.down()},
                            options_, hooks);
      check_source();
      store_.save_learned(*learned);
    }
    char text[96];
    std::snprintf(text, sizeof text, "basis learned: largest error of orthogonality %.1e",
                  learned->orthogonality_error);
    note(text);
    result_.basis_losses = learned->losses;
    basis_.deploy(std::move(learned->basis), options_);
    linear_bytes_ += transform_bytes(basis_.input());
    if (basis_.learned()->layerwise()) linear_bytes_ += transform_bytes(basis_.output());
  }

  // Every few steps, but so that writing takes at most a twentieth of the time.
  void keep_learning(const Transfer& transfer, bool leaving) {
    const auto start = Clock::now();
    if (!leaving && start < next_keep_) return;
    check_source();
    store_.save_learning(transfer);
    next_keep_ = Clock::now() + std::max<Clock::duration>(kKeepEvery, 20 * (Clock::now() - start));
  }

  // Lets the scales of all finished layers learn from the original's predictions, then writes them.
  void refine(const Calibration& calibration, const std::vector<float>& reference) {
    std::vector<OwnedLayer> layers;
    for (QuantizedLayer& finished : finished_) layers.push_back(std::move(finished.layer));
    const Transform input = basis_.input(), output = basis_.output();
    const RefineHooks hooks{[&](int64_t step, int64_t n_steps, double kl) {
                              if (hooks_.descent) hooks_.descent("refining", step, n_steps, kl);
                            },
                            [&] { check_interrupted(); }};
    const RefineResult& refined = result_.refined =
        refine_scales(layers, {source_, calibration, reference, input, output}, options_, hooks);
    char text[128];
    std::snprintf(text, sizeof text, "scales refined: KL to the original %.4f before, %.4f after%s",
                  refined.before, refined.after, refined.kept() ? "" : ", so they were not kept");
    note(text);
    for (size_t i = 0; i < layers.size(); ++i) {
      finished_[i].layer = std::move(layers[i]);
      for (LinearReport& report : finished_[i].reports) report.refined = refined.kept();
      write_layer(static_cast<int64_t>(i), finished_[i]);
    }
  }

  void note_kept(const char* name, const Table& table) const {
    if (!table.kept) return;
    note(std::string(name) + " stays in 16 bits: the scales of its groups would leave f16's range");
  }

  void write_tables() {
    if (basis_.input().active()) writer_.add_residual_basis(basis_.input());
    if (basis_.learned() && basis_.learned()->layerwise()) {
      writer_.add_output_basis(basis_.output());
    }
    const Table table(source_.tok_embed, options_.embed_bits, options_);
    note_kept("tok_embed", table);
    writer_.add_table(table.matrix);
    Linear head;
    // The head reads 8-bit activations when it is packed itself: their error is far below that of
    // its weights, and integer arithmetic needs them.
    head.act.bits = options_.head_bits < 16 && options_.bits_a < 16 ? 8 : 16;
    head.act.group = options_.group;
    if (source_.config.tied) {
      head.weight = table.matrix;
      if (table.kept) head.act.bits = 16;
      writer_.add_linear("lm_head", head, true);
    } else {
      const Table head_table(source_.lm_head.weight, options_.head_bits, options_);
      note_kept("lm_head", head_table);
      head.weight = head_table.matrix;
      if (head_table.kept) head.act.bits = 16;
      writer_.add_linear("lm_head", head);
    }
    writer_.add_f32("final_norm", source_.final_norm);
    writer_.set_kv_bits(options_.kv_bits);
    if (hooks_.done_with) {
      hooks_.done_with(source_.tok_embed);
      if (!source_.config.tied) hooks_.done_with(source_.lm_head.weight);
    }
  }

  FloatLayer folded(int64_t layer) const { return fold_layer(source_, layer, options_, basis_); }

  bool take_finished(int64_t layer) {
    if (!resuming_) return false;
    check_interrupted();
    std::optional<QuantizedLayer> finished =
        unless_damaged([&] { return store_.load(layer, basis_.down()); });
    if (!finished) return false;
    ++result_.n_resumed;
    finish_layer(layer, std::move(*finished));
    return true;
  }

  void work_on_layer(int64_t layer, CalibrationStream* stream) {
    const auto stop = [&] { check_interrupted(); };
    stop();
    const FloatLayer folded_layer = folded(layer);
    std::optional<LayerStats> stats;
    if (stream) {
      step(layer, "calibrating");
      stats.emplace(source_.config, options_);
      stream->run_layer(
          folded_layer.view(),
          [&](Site site, const float* x, int64_t rows, int64_t) {
            stats->at(site).add(x, rows, options_.threads);
          },
          stop);
    }
    step(layer, "rounding");
    QuantizedLayer quantized = quantize_layer(folded_layer, layer, options_, source_.config, basis_,
                                              stats ? &*stats : nullptr, stop);
    check_source();
    if (keeps_results_) store_.save(layer, quantized);
    finish_layer(layer, std::move(quantized));
  }

  // Refinement still changes a layer, so then it is kept until the end.
  void finish_layer(int64_t layer, QuantizedLayer quantized) {
    if (options_.refine_steps > 0) {
      finished_.push_back(std::move(quantized));
    } else {
      write_layer(layer, quantized);
    }
  }

  void write_layer(int64_t layer, const QuantizedLayer& quantized) {
    const Layer view = quantized.layer.view();
    write_norms(layer, view);
    for (int i = 0; i < kNLinears; ++i) {
      const OwnedLinear& linear = quantized.layer.linears[static_cast<size_t>(i)];
      writer_.add_linear(quantized.reports[static_cast<size_t>(i)].name, linear.view());
      linear_bytes_ += linear.n_bytes();
      n_weights_ += linear.weight.rows * linear.weight.cols;
      result_.linears.push_back(quantized.reports[static_cast<size_t>(i)]);
    }
    for (const NamedSkip& named : kLayerSkips) {
      const auto& skip = view.*named.member;
      if (skip) writer_.add_skip("layers." + std::to_string(layer) + "." + named.name, *skip);
    }
    linear_bytes_ += skip_bytes(view);
  }

  void write_norms(int64_t layer, const Layer& norms) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    writer_.add_f32(prefix + "attn_norm", norms.attn_norm);
    writer_.add_f32(prefix + "ffn_norm", norms.ffn_norm);
    if (!norms.q_norm.empty()) writer_.add_f32(prefix + "q_norm", norms.q_norm);
    if (!norms.k_norm.empty()) writer_.add_f32(prefix + "k_norm", norms.k_norm);
  }

  // Method none: 16-bit sources keep their bytes, f32 sources become f16 where that holds them.
  void copy_layer(int64_t layer) {
    check_interrupted();
    const Layer& from = source_.layers[static_cast<size_t>(layer)];
    write_norms(layer, from);
    for (const LinearPlan& plan : plan_layer(options_, source_.config, layer)) {
      const size_t index = result_.linears.size() % kNLinears;
      const Matrix& weight = (from.*kLayerLinears[index].member).weight;
      const Table stored(weight, 16, options_);
      Linear linear;
      linear.weight = stored.matrix;
      writer_.add_linear(plan.name, linear);
      linear_bytes_ += stored.matrix.data_bytes();
      n_weights_ += weight.rows * weight.cols;
      LinearReport report;
      report.name = plan.name;
      report.out = plan.out;
      report.in = plan.in;
      report.bits_per_weight = 16;
      report.weight_snr_db = INFINITY;
      if (weight.storage == Storage::kF32) {
        OwnedLinear copy;
        copy.weight = stored.owned;
        report = measure_linear(plan.name, to_float_matrix(weight), copy, 0, nullptr, 1);
      }
      result_.linears.push_back(report);
    }
  }

  void release_layer(int64_t layer) const {
    if (!hooks_.done_with) return;
    for (const NamedLinear& linear : kLayerLinears) {
      hooks_.done_with((source_.layers[static_cast<size_t>(layer)].*linear.member).weight);
    }
  }

  void finish(const Calibration* calibration, const Backend& backend) {
    check_interrupted();
    check_source();
    result_.bits_per_weight =
        8.0 * static_cast<double>(linear_bytes_) / static_cast<double>(n_weights_);
    result_.quantization = describe_options(options_);
    if (calibration) {
      result_.quantization["calib_samples"] = calibration->samples.size();
      result_.quantization["calib_hash"] = hex(calibration->hash());
      add_device(result_.quantization, backend);
    }
    result_.quantization["bits_per_weight"] = result_.bits_per_weight;
    Json header = result_.quantization;
    for (const LinearReport& linear : result_.linears) {
      header["distortion"][linear.name] = distortion_json(linear);
    }
    writer_.finish(source_.texts, header, hooks_.try_file);
    result_.file_bytes = writer_.bytes_written();
    if (keeps_results_) store_.remove();
  }

  const Model& source_;
  const QuantizeOptions& options_;
  const QuantizeHooks& hooks_;
  ModelBasis basis_;
  ResumeStore store_;
  TqWriter writer_;
  QuantizeResult result_;
  std::vector<QuantizedLayer> finished_;
  bool keeps_results_ = false, resuming_ = false;
  Clock::time_point next_keep_;  // the state of learning
  uint64_t linear_bytes_ = 0;
  int64_t n_weights_ = 0;
};

}  // namespace

QuantizeResult quantize_model(const Model& source, const QuantizeOptions& options,
                              const Calibration* calibration, uint64_t weights_hash,
                              Backend& backend, const std::string& output, bool resume,
                              const QuantizeHooks& hooks, Replace replace) {
  fix_block_sizes();
  if (!options.needs_calibration()) calibration = nullptr;
  Pipeline pipeline(source, options, hooks, output, replace);
  return pipeline.run(calibration,
                      make_fingerprint(source, options, calibration, weights_hash, backend),
                      backend, resume);
}

}  // namespace tq
