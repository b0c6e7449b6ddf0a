// SPDX-License-Identifier: Apache-2.0
#include <annulus/bench/bench.hpp>

#include <annulus/attention/product_rate.hpp>
#include <annulus/bench/statistics.hpp>
#include <annulus/core/error.hpp>
#include <annulus/kernels/cpu.hpp>
#include <annulus/plan/cost.hpp>
#include <annulus/session/job_plan.hpp>

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>

namespace annulus {

namespace {

/// Rows compared with the oracle before a configuration is timed.
constexpr std::int64_t kCheckedRows = 64;

/// Milliseconds of each repetition, the same on all ranks. `keep` is told of each one while its timings can be asked for. Fewer than
/// `repetitions` if the job is to stop.
template <class Keep>
std::vector<double> time_runs(Session& session, std::int64_t warmup, std::int64_t repetitions, Passing passing, StopRequest& stop,
                              Keep&& keep) {
  std::vector<double> samples;
  for (std::int64_t i = 0; i < warmup + repetitions; ++i) {
    if (stop.agreed(session.comm())) { return samples; }  // it is the barrier from which all ranks start, too
    session.run(passing);
    const double ms = session.slowest_ms();
    if (i < warmup) { continue; }
    samples.push_back(ms);
    keep();
  }
  return samples;
}

/// The repetition whose time is the median, of an even number the faster one of the middle two.
std::size_t median_repetition(const std::vector<double>& samples) {
  std::vector<std::size_t> order(samples.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return samples[a] < samples[b]; });
  return order[(order.size() - 1) / 2];
}

/// Runs once more, counting clock cycles. 0 where the kernel does not count them. @param flops of all ranks
double share_of_cycles(Session& session, double flops) {
  bool counts = true;
  for (const auto& executor : session.executors()) { counts = executor->count_cycles() && counts; }
  if (!counts) { return 0; }
  session.run();
  double possible = 0;
  for (const auto& executor : session.executors()) { possible += executor->possible_flops(); }
  possible = session.comm().sum(possible);
  return possible > 0 ? flops / possible : 0;
}

/// The configuration with what only the running session knows.
Config as_run(const Session& session) {
  Config config = session.resolved().config;
  config.pattern = session.pattern();
  config.scale = session.problem().scale;
  config.dtype = session.problem().dtype;
  config.transport = session.transport_kind();
  return config;
}

}  // namespace

void require_runnable(const Config& config, const Communicator& comm, PlanCache& plans) {
  const ResolvedConfig resolved = resolve(config, comm);
  const Session session(resolved, comm, {}, &plans);
}

std::optional<BenchReport> bench(const Config& config, const Communicator& comm, PlanCache& plans, StopRequest& stop,
                                 const Machine* machine) {
  if (stop.agreed(comm)) { return std::nullopt; }
  const ResolvedConfig resolved = resolve(config, comm);
  Session session(resolved, comm, {}, &plans);
  session.load();
  session.run();
  BenchReport report;
  report.check = check_session(session, config.rows == 0 ? kCheckedRows : config.rows);
  together(comm, [&] {
    const Verdict& verdict = report.check.verdict;
    if (!verdict.passed) { throw RuntimeFailure(fmt::format("the output is wrong and is not timed: {}", verdict.reason)); }
  });
  report.check.name = "configured problem";
  report.config = as_run(session);
  report.ranks = session.ranks();
  report.backend = session.kernel().describe();
  report.input = resolved.input().describe();

  std::vector<std::vector<std::vector<StepTiming>>> repetitions;
  std::vector<double> backward;
  report.samples_ms = time_runs(session, config.warmup, config.repetitions, Passing::on, stop, [&] {
    repetitions.push_back(session.local_timings());
    backward.push_back(session.backward_ms());
  });
  if (stop.cause() != StopCause::none) { return std::nullopt; }
  report.backward_ms = median(backward);
  report.median_ms = median(report.samples_ms);
  report.min_ms = *std::min_element(report.samples_ms.begin(), report.samples_ms.end());
  report.p95_ms = percentile(report.samples_ms, 95.0);
  report.timings = gather_timings(comm, repetitions[median_repetition(report.samples_ms)]);
  report.steps = summarize_steps(report.timings);
  report.run = summarize_run(report.timings);
  report.memory_high_water = comm.max(session.device().memory().high_water);
  if (session.ranks() > 1) {
    const std::vector<double> blocks_alone_ms = time_runs(session, 1, config.repetitions, Passing::off, stop, [] {});
    if (stop.cause() != StopCause::none) { return std::nullopt; }
    report.blocks_alone_ms = median(blocks_alone_ms);
    report.overlap_efficiency = report.blocks_alone_ms / report.median_ms;
  }
  double layer_flops = 0;
  double backward_flops = 0;
  for (const auto& executor : session.executors()) {
    const PlanCost cost = plan_cost(executor->plan());
    report.flops += cost.flops;
    backward_flops += gradient_flops(executor->plan().problem, cost);
    report.bytes_received += static_cast<std::int64_t>(cost.bytes_received);  // of memory that is there
    const RingPlan& plan = executor->plan();
    if (resolved.layer) { layer_flops += layer_cost_of(resolved.config, *resolved.layer, plan.problem, plan.local_rows).flops; }
  }
  report.bytes_received = comm.sum(report.bytes_received);
  backward_flops = comm.sum(backward_flops);
  if (report.backward_ms > 0) {
    report.backward_tflops_per_rank = backward_flops / report.backward_ms / 1e9 / static_cast<double>(session.ranks());
  }
  const double attention_flops = comm.sum(report.flops);
  report.flops = attention_flops + comm.sum(layer_flops);
  report.tflops_per_rank = report.flops / report.median_ms / 1e9 / static_cast<double>(session.ranks());
  report.of_cycles = share_of_cycles(session, attention_flops);
  if (session.device().kind() == BackendKind::cpu) {
    report.fma_peak_gflops = kernels::cpu::fma_peak_gflops(static_cast<int>(resolved.config.threads));
    const double gflops = report.flops / report.median_ms / 1e6 / static_cast<double>(comm.size());
    report.of_peak = gflops / report.fma_peak_gflops;
  }
  if (session.device().kind() == BackendKind::cuda && size_of(session.problem().dtype) == 2) {
    together(comm, [&] { report.product_tflops = product_rate(session.problem().dtype) / 1e12; });
    // Of the processes, each of which has a GPU and works for all its ranks.
    const double tflops = report.flops / report.median_ms / 1e9 / static_cast<double>(comm.size());
    if (report.product_tflops > 0) { report.of_peak = tflops / report.product_tflops; }
  }
  together(comm, [&] {
    if (machine == nullptr || comm.rank() != 0) { return; }
    const bool in_one_process = session.transport_kind() == TransportKind::loopback;
    report.predicted_ms = predict_job(resolved, *machine, in_one_process ? RankHome::one_process : RankHome::processes).total_ms;
    report.prediction_error = report.predicted_ms / report.median_ms - 1;
  });
  return report;
}

}  // namespace annulus
