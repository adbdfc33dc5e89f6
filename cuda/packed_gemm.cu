// packed_gemm - placeholder until the tiled kernel stands.
#include "cuda/device.cuh"
#include "model/error.h"
namespace tq::cuda {
void launch_packed_gemm(const PackedJob& job, const Gpu& gpu) {
  for (int64_t row = 0; row < job.rows; row += kMatvecRows) {
    PackedJob part = job;
    part.rows = std::min(kMatvecRows, job.rows - row);
    const auto shift = [&](RoundedRows& x) { x.codes += row * x.padded_cols; x.scales += row; };
    shift(part.x);
    for (int i = 0; i < part.n_segments; ++i) {
      shift(part.segments[i].h);
      part.segments[i].y += row * part.segments[i].w.rows;
    }
    launch_packed_matvec(part, gpu);
  }
}
}  // namespace tq::cuda
