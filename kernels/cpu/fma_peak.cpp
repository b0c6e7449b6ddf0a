// SPDX-License-Identifier: Apache-2.0
#include "fma_peak.hpp"

#include <annulus/kernels/cpu.hpp>

#include "isa.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

namespace annulus::kernels::cpu {
namespace {

constexpr int kMeasurements = 5;
constexpr double kMeasurementSeconds = 0.05;

/// Seconds that all threads together take for `iterations` each.
double seconds(const FmaLoop& loop, std::int64_t iterations, int threads) {
  using Clock = std::chrono::steady_clock;
  std::atomic<float> sink = 0.0F;
  Clock::time_point start;
  Clock::time_point end;
#pragma omp parallel num_threads(threads)
  {
#pragma omp barrier
#pragma omp master
    start = Clock::now();
#pragma omp barrier
    sink = loop.run(iterations);
#pragma omp barrier
#pragma omp master
    end = Clock::now();
  }
  return std::chrono::duration<double>(end - start).count();
}

}  // namespace

double fma_peak_gflops(int threads) {
  if (!supported()) { throw std::runtime_error("this CPU has neither AVX2 (with FMA and F16C) nor AVX-512"); }
  const FmaLoop loop = detected_isa() == Isa::avx512 ? avx512_fma_loop() : avx2_fma_loop();
  std::int64_t iterations = 1 << 16;
  double elapsed = seconds(loop, iterations, threads);
  while (elapsed < kMeasurementSeconds) {
    iterations *= 2;
    elapsed = seconds(loop, iterations, threads);
  }
  double best = elapsed;
  for (int i = 1; i < kMeasurements; ++i) { best = std::min(best, seconds(loop, iterations, threads)); }
  return loop.flops_per_iteration * static_cast<double>(iterations) * threads / best * 1e-9;
}

}  // namespace annulus::kernels::cpu
