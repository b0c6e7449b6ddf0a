// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench.hpp>

#include <annulus/bench/statistics.hpp>
#include <annulus/core/error.hpp>
#include <annulus/kernels/cpu.hpp>
#include <annulus/plan/cost.hpp>

#include <fmt/format.h>

#include <algorithm>

namespace annulus {

namespace {

/// Rows compared with the oracle before a configuration is timed.
constexpr std::int64_t kCheckedRows = 64;

std::vector<double> time_runs(Session& session, std::int64_t warmup, std::int64_t repetitions, Passing passing) {
  std::vector<double> samples;
  for (std::int64_t i = 0; i < warmup + repetitions; ++i) {
    session.comm().barrier();
    session.run(passing);
    const double ms = session.slowest_ms();
    if (i >= warmup) { samples.push_back(ms); }
  }
  return samples;
}

}  // namespace

BenchReport bench(const Config& config, const Communicator& comm) {
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm);
  session.load();
  session.run();
  BenchReport report;
  report.check = check_session(session, config.rows == 0 ? kCheckedRows : config.rows);
  together(comm, [&] {
    const Verdict& verdict = report.check.verdict;
    if (!verdict.passed) { throw RuntimeFailure(fmt::format("the output is wrong and is not timed: {}", verdict.reason)); }
  });

  const std::vector<double> samples = time_runs(session, config.warmup, config.repetitions, Passing::on);
  report.repetitions = config.repetitions;
  report.median_ms = median(samples);
  report.min_ms = *std::min_element(samples.begin(), samples.end());
  report.p95_ms = percentile(samples, 95.0);
  report.timings = session.gather_timings();
  if (session.ranks() > 1) {
    report.blocks_alone_ms = median(time_runs(session, 1, config.repetitions, Passing::off));
    report.overlap_efficiency = report.blocks_alone_ms / report.median_ms;
  }
  std::int64_t pairs = 0;
  for (const auto& executor : session.executors()) {
    const PlanCost cost = plan_cost(executor->plan());
    pairs += cost.pairs;
    report.bytes_received += cost.bytes_received;
  }
  report.bytes_received = comm.sum(report.bytes_received);
  report.flops = 4.0 * static_cast<double>(session.problem().head_dim) * static_cast<double>(comm.sum(pairs));
  report.tflops_per_rank = report.flops / report.median_ms / 1e9 / static_cast<double>(session.ranks());
  if (session.backend().kind() == BackendKind::cpu) {
    report.peak_gflops = kernels::cpu::fma_peak_gflops(static_cast<int>(resolved.config.threads));
    const double gflops = report.flops / report.median_ms / 1e6 / static_cast<double>(comm.size());
    report.of_peak = gflops / report.peak_gflops;
  }
  return report;
}

}  // namespace annulus
