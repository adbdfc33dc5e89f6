// options - presets, contradictions, and the storage plan of a layer. See options.h.
#include "quant/options.h"

#include <algorithm>
#include <regex>

#include "model/error.h"

namespace tq {
namespace {

struct Preset {
  const char* name;
  Basis basis;
  RoundingKind rounding;
  int64_t rank = 0;
  Split split = Split::kSvd;
  int branch_bits = 16;
  ActCodes act_codes = ActCodes::kSymmetric;
  int64_t steps = 0, refine_steps = 0;
};

// Steps: what fits twenty minutes on two cores for SmolLM2. More still help.
constexpr Preset kPresets[] = {
    {"none", Basis::kNone, RoundingKind::kStore},
    {"rtn", Basis::kNone, RoundingKind::kNearest},
    {"gptq", Basis::kNone, RoundingKind::kGptq},             // Frantar et al. 2023
    {"quarot", Basis::kHadamard, RoundingKind::kGptq},       // Ashkboos et al. 2024
    {"svdquant", Basis::kNone, RoundingKind::kNearest, 32},  // Li et al. 2025
    {.name = "spinquant",                                    // Liu et al. 2025
     .basis = Basis::kLearned,
     .rounding = RoundingKind::kGptqCorrected,
     .act_codes = ActCodes::kAll,
     .steps = kLearningSteps},
    {.name = "respinquant",  // Kim et al. 2026
     .basis = Basis::kLayerwise,
     .rounding = RoundingKind::kGptqCorrected,
     .act_codes = ActCodes::kAll,
     .steps = kLearningSteps},
    {.name = "twinquant",  // Wang et al. 2026
     .basis = Basis::kLearned,
     .rounding = RoundingKind::kGptqCorrected,
     .rank = 32,
     .split = Split::kFit,
     .branch_bits = 4,
     .act_codes = ActCodes::kAll,
     .steps = kLearningSteps,
     .refine_steps = 24}};

const char* basis_name(Basis basis) {
  switch (basis) {
    case Basis::kNone:
      return "none";
    case Basis::kHadamard:
      return "hadamard";
    case Basis::kLearned:
      return "learned";
    case Basis::kLayerwise:
      return "layerwise";
  }
  return "?";
}

const char* rounding_name(RoundingKind rounding) {
  switch (rounding) {
    case RoundingKind::kStore:
      return "none";
    case RoundingKind::kNearest:
      return "rtn";
    case RoundingKind::kGptq:
      return "gptq";
    case RoundingKind::kGptqCorrected:
      return "gptq-ls";
  }
  return "?";
}

const char* loss_name(LearningLoss loss) {
  switch (loss) {
    case LearningLoss::kLayer:
      return "layer";
    case LearningLoss::kBlock:
      return "block";
    case LearningLoss::kKl:
      return "kl";
    case LearningLoss::kCrossEntropy:
      return "ce";
  }
  return "?";
}

[[noreturn]] void usage(const std::string& why, const std::string& hint = "") {
  throw Error(ErrorKind::kUsage, "usage", "tq quantize", why, hint);
}

std::string linear_name(int64_t layer, const char* name) {
  return "layers." + std::to_string(layer) + "." + name;
}

// Whether --keep PATTERN means this linear. A bound on the pattern bounds the depth to which
// std::regex recurses; its matcher without backtracking (libstdc++'s own flag) is never
// exponential.
bool keeps(const std::string& pattern, const std::string& name) {
  constexpr size_t kMaxPattern = 256;
  if (pattern.size() > kMaxPattern) {
    usage("--keep: an expression of " + std::to_string(pattern.size()) + " bytes",
          "at most " + std::to_string(kMaxPattern) + "; the option may be repeated");
  }
  try {
    constexpr auto kSyntax = std::regex::ECMAScript | std::regex_constants::__polynomial;
    return std::regex_search(name, std::regex(pattern, kSyntax));
  } catch (const std::regex_error& error) {
    usage("--keep " + pattern + " is not a regular expression", error.what());
  }
}

uint64_t matrix_bytes(int64_t rows, int64_t cols, int bits, int64_t group) {
  if (bits == 3) bits = 4;  // as they are stored
  const uint64_t row_bytes = static_cast<uint64_t>((cols * bits + 7) / 8);
  const uint64_t n_groups = bits < 16 ? static_cast<uint64_t>((cols + group - 1) / group) : 0;
  return static_cast<uint64_t>(rows) * (row_bytes + 2 * n_groups);
}

}  // namespace

std::string method_names() {
  std::string names;
  for (const Preset& preset : kPresets)
    names += (names.empty() ? "" : ", ") + std::string(preset.name);
  return names;
}

QuantizeOptions method_preset(const std::string& method) {
  for (const Preset& preset : kPresets) {
    if (method != preset.name) continue;
    QuantizeOptions options;
    options.method = method;
    options.basis = preset.basis;
    options.rounding = preset.rounding;
    options.rank = preset.rank;
    options.split = preset.split;
    options.branch_bits = preset.branch_bits;
    options.act_codes = preset.act_codes;
    options.steps = preset.steps;
    options.refine_steps = preset.refine_steps;
    if (preset.rounding == RoundingKind::kStore) options.bits_w = options.bits_a = 16;
    return options;
  }
  usage("--method " + method + " does not exist", "methods: " + method_names());
}

namespace {

void check_two_level(const QuantizeOptions& options) {
  if (options.bits_w != 4 && options.bits_w != 3) {
    usage("--two-level contradicts --bits-w " + std::to_string(options.bits_w),
          "multiples of wider codes do not fit a byte");
  }
  if (options.rank > 0 && options.branch_bits == 8) {
    usage("--two-level contradicts --branch-bits 8", "4 or 16");
  }
  if (options.act_codes == ActCodes::kAsymmetric) {
    usage("--two-level contradicts --act-codes asymmetric",
          "multiples of its codes do not fit a byte");
  }
  if (options.group_a == kTokenGroups) {
    usage("--two-level contradicts --group-a token", "multiples need groups");
  }
}

// An expression that keeps nothing is a misspelt one.
void check_keep(const QuantizeOptions& options, const Config& config) {
  for (const std::string& pattern : options.keep) {
    if (pattern.empty()) usage("--keep is empty", "it would keep every linear");
    bool found = false;
    for (int64_t layer = 0; layer < config.n_layers && !found; ++layer) {
      for (const NamedLinear& linear : kLayerLinears) {
        found = found || keeps(pattern, linear_name(layer, linear.name));
      }
    }
    if (found) continue;
    usage("--keep " + pattern + " matches no linear", "their names are layers.0.wq to layers." +
                                                          std::to_string(config.n_layers - 1) +
                                                          ".w_down; tq inspect lists them");
  }
}

}  // namespace

void check_options(const QuantizeOptions& options, const Config& config) {
  check_keep(options, config);
  const bool rounds = options.rounding != RoundingKind::kStore;
  if (rounds != (options.bits_w < 16)) {
    usage("--bits-w " + std::to_string(options.bits_w) + " contradicts --method " + options.method);
  }
  if (options.copies_weights() && options.bits_w == 32) {
    usage("--bits-w 32 contradicts --method none", "it stores 16 bits");
  }
  if (options.copies_weights() && options.bits_a != 16) {
    usage("--bits-a " + std::to_string(options.bits_a) + " contradicts --method none",
          "it rounds nothing");
  }
  if (options.act_codes == ActCodes::kAsymmetric && options.bits_a != 4 && options.bits_a != 3) {
    usage("--act-codes asymmetric contradicts --bits-a " + std::to_string(options.bits_a),
          "give --bits-a 4 or 3; wider codes, shifted by their zero point, do not fit a byte");
  }
  if (options.two_level) check_two_level(options);
  if (options.group_a == kTokenGroups && config.head_dim % 32 != 0) {
    usage("--group-a token needs heads whose size is a multiple of 32",
          "this model's have " + std::to_string(config.head_dim) + " columns");
  }
  if (options.act_order && !options.uses_gptq()) {
    usage("--act-order has no effect without GPTQ", "give --rounding gptq or gptq-ls");
  }
  if (options.rank > 0 && !rounds) usage("--rank has no effect when weights are not rounded");
  if (options.refine_steps > 0 && !rounds) {
    usage("--refine-steps has no effect when weights are not rounded");
  }
  if (options.rank > 0 && options.split == Split::kFit && !options.uses_gptq()) {
    usage("--split fit needs --rounding gptq or gptq-ls", "it fits what GPTQ leaves over");
  }
  if (options.rank > 0 && options.split == Split::kFit && options.branch_bits == 16) {
    usage("--branch-bits 16 contradicts --split fit", "4 or 8");
  }
  if (options.learns_basis() && options.loss == LearningLoss::kCrossEntropy &&
      options.calib_length < 2) {
    usage("--loss ce contradicts --calib-length 1", "one token has no next one");
  }
  if (options.loss != LearningLoss::kLayer && options.rounds_branch() &&
      options.split == Split::kSvd) {
    usage("--loss contradicts --split svd", "G is learned from the outputs of linears");
  }
  if (options.basis == Basis::kLayerwise && options.basis_rank > config.dim) {
    usage("--basis-rank " + std::to_string(options.basis_rank) + " exceeds the model's width",
          "at most " + std::to_string(config.dim));
  }
  const int64_t smallest =
      std::min({config.dim, config.hidden_dim, config.q_dim(), config.kv_dim()});
  if (options.rank > smallest) {
    usage("--rank " + std::to_string(options.rank) + " exceeds the smallest side of a weight",
          "at most " + std::to_string(smallest) + " for this model");
  }
  if (config.tied && options.embed_bits != options.head_bits) {
    usage("--embed-bits " + std::to_string(options.embed_bits) + " contradicts --head-bits " +
              std::to_string(options.head_bits),
          "this model's head is its embedding, stored once");
  }
  if (options.needs_calibration() && options.calib_length > config.max_seq_len) {
    usage("--calib-length " + std::to_string(options.calib_length) + " exceeds the model's context",
          "at most " + std::to_string(config.max_seq_len));
  }
}

Json describe_options(const QuantizeOptions& options) {
  Json json;
  json["method"] = options.method;
  json["basis"] = basis_name(options.basis);
  if (options.basis == Basis::kLayerwise) json["basis_rank"] = options.basis_rank;
  json["rounding"] = rounding_name(options.rounding);
  if (options.act_order) json["act_order"] = true;
  json["bits_w"] = options.bits_w;
  json["bits_a"] = options.bits_a;
  json["group"] = options.group;
  json["group_a"] = options.group_a == kTokenGroups ? Json("token") : Json(options.group_a);
  json["full_range"] = options.act_codes == ActCodes::kAll;
  if (options.act_codes == ActCodes::kAsymmetric) json["asymmetric"] = true;
  if (options.two_level) json["two_level"] = true;
  json["rank"] = options.rank;
  if (options.rank > 0) {
    json["split"] = options.split == Split::kFit ? "fit" : "svd";
    json["branch_bits"] = options.branch_bits;
  }
  if (options.learns_basis()) {
    json["steps"] = options.steps;
    json["loss"] = loss_name(options.loss);
  }
  json["refine_steps"] = options.refine_steps;
  json["embed_bits"] = options.embed_bits;
  json["head_bits"] = options.head_bits;
  json["kv_bits"] = options.kv_bits;
  json["keep"] = options.keep;
  json["seed"] = options.seed;
  if (options.needs_calibration()) {
    json["calib_samples"] = options.calib_samples;
    json["calib_length"] = options.calib_length;
  }
  return json;
}

int64_t input_group(const QuantizeOptions& options, const Config& config, Site site) {
  const bool one_scale = options.two_level && options.bits_a == 8;
  if (options.group_a != kTokenGroups && !one_scale) return options.group_a;
  switch (site) {
    case Site::kAttnOut:
      return one_scale ? config.q_dim() : config.head_dim;
    case Site::kFfnMid:
      return config.hidden_dim;
    default:
      return config.dim;
  }
}

std::vector<LinearPlan> plan_layer(const QuantizeOptions& options, const Config& config,
                                   int64_t layer) {
  const int64_t shapes[kNLinears][2] = {
      {config.q_dim(), config.dim},    {config.kv_dim(), config.dim},
      {config.kv_dim(), config.dim},   {config.dim, config.q_dim()},
      {config.hidden_dim, config.dim}, {config.hidden_dim, config.dim},
      {config.dim, config.hidden_dim}};
  std::vector<LinearPlan> plan;
  for (int i = 0; i < kNLinears; ++i) {
    LinearPlan linear;
    linear.name = linear_name(layer, kLayerLinears[i].name);
    linear.out = shapes[i][0];
    linear.in = shapes[i][1];
    for (const std::string& pattern : options.keep) {
      linear.keep = linear.keep || keeps(pattern, linear.name);
    }
    plan.push_back(linear);
  }
  const bool keep_qkv = plan[kWq].keep || plan[kWk].keep || plan[kWv].keep;
  for (LinearIndex index : {kWq, kWk, kWv}) plan[index].keep = keep_qkv;
  const bool keep_ffn = plan[kWGate].keep || plan[kWUp].keep;
  for (LinearIndex index : {kWGate, kWUp}) plan[index].keep = keep_ffn;
  return plan;
}

uint64_t linear_bytes(const QuantizeOptions& options, const LinearPlan& plan) {
  if (plan.keep) return matrix_bytes(plan.out, plan.in, 16, 0);
  uint64_t bytes = matrix_bytes(plan.out, plan.in, options.bits_w, options.group);
  if (options.rank > 0) {
    bytes += matrix_bytes(options.rank, plan.in, options.branch_bits, options.group);
    bytes += matrix_bytes(plan.out, options.rank, options.branch_bits, options.group);
  }
  return bytes;
}

}  // namespace tq
