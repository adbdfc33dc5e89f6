// distortion - measures a stored linear against its original. See distortion.h.
#include "quant/distortion.h"

#include <cmath>
#include <cstdio>

#include "quant/decompose.h"

namespace tq {
namespace {

double ratio_db(double signal, double noise) {
  if (noise <= 0) return INFINITY;
  return 10.0 * std::log10(signal / noise);
}

double number_or_infinity(const Json& json) {
  return json.is_null() ? INFINITY : json.get<double>();
}

Json finite_or_null(double value) {
  return std::isfinite(value) ? Json(value) : Json(nullptr);
}

}  // namespace

LinearReport measure_linear(const std::string& name, const FloatMatrix& w,
                            const OwnedLinear& stored, int64_t n_clipped, const Gram* gram,
                            int threads) {
  LinearReport report;
  report.name = name;
  report.out = w.rows;
  report.in = w.cols;
  const double n_weights = static_cast<double>(w.size());
  report.bits_per_weight = 8.0 * static_cast<double>(stored.n_bytes()) / n_weights;
  report.clipped = static_cast<double>(n_clipped) / n_weights;

  FloatMatrix error = to_float_matrix(stored.weight.view());
  double signal = 0, noise = 0;
  for (size_t i = 0; i < w.data.size(); ++i) error.data[i] = w.data[i] - error.data[i];
  if (stored.branch_a) {
    error = subtract_product(error, to_float_matrix(stored.branch_b->view()),
                             to_float_matrix(stored.branch_a->view()));
  }
  for (size_t i = 0; i < w.data.size(); ++i) {
    signal += static_cast<double>(w.data[i]) * static_cast<double>(w.data[i]);
    noise += static_cast<double>(error.data[i]) * static_cast<double>(error.data[i]);
  }
  report.weight_snr_db = ratio_db(signal, noise);
  if (gram) {
    report.output_snr_db =
        ratio_db(output_energy(w, *gram, threads), output_energy(error, *gram, threads));
  }
  return report;
}

Json to_json(const LinearReport& report) {
  Json json;
  json["name"] = report.name;
  json["out"] = report.out;
  json["in"] = report.in;
  json["bits_per_weight"] = report.bits_per_weight;
  Json& ratios = report.refined ? json["before_refinement"] : json;
  ratios["weight_snr_db"] = finite_or_null(report.weight_snr_db);
  if (report.output_snr_db) ratios["output_snr_db"] = finite_or_null(*report.output_snr_db);
  json["clipped"] = report.clipped;
  return json;
}

LinearReport report_from_json(const Json& json) {
  LinearReport report;
  report.name = json.at("name").get<std::string>();
  report.out = json.at("out").get<int64_t>();
  report.in = json.at("in").get<int64_t>();
  report.bits_per_weight = json.at("bits_per_weight").get<double>();
  report.weight_snr_db = number_or_infinity(json.at("weight_snr_db"));
  if (json.contains("output_snr_db")) {
    report.output_snr_db = number_or_infinity(json.at("output_snr_db"));
  }
  report.clipped = json.at("clipped").get<double>();
  return report;
}

std::string decibels(double value) {
  if (!std::isfinite(value)) return "exact";
  char text[32];
  std::snprintf(text, sizeof text, "%.1f", value);
  return text;
}

}  // namespace tq
